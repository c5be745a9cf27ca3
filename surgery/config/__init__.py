"""config.json and its like: sizes and token ids, rewritten."""
