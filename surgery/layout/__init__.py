"""The layout of a checkpoint: its tensors matched with its family."""
