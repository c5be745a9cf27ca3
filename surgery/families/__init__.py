"""What each model type is made of, as a table."""
