"""Several variants of one model, tried on one text."""
