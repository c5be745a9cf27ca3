"""Make a plan from sizes and statistics."""
