"""Published code of other papers and this package, measured alike; each peer runs from its own repository."""
