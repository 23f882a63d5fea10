"""`linearize demo`: the embedded teacher, recall documents, and the run that shows a whole conversion."""
