"""Score a model on held-out text, and compare logits."""
