"""The library's own model, one layer's weights at a time."""
