"""What a checkpoint of an unknown model type may be."""
