"""Which tokens to keep, and what it costs to remove the others."""
