"""Scores on held-out text, and logits compared."""
