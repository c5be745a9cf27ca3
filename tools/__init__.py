"""Scripts that build the demo checkpoint and its texts."""
