"""The tensors and axes of each model type, as a table."""
