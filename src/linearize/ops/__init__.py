"""Pure operations: tensors and a state in, outputs and a state out. Nothing here knows of models."""
