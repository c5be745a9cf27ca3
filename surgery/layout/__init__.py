"""A checkpoint seen through its family."""
