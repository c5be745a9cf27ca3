"""Channel statistics, taken from text."""
