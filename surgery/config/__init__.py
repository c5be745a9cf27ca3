"""Sizes and token ids in config.json and other JSON files: find and rewrite them."""
