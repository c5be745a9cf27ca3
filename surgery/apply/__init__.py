"""Write the checkpoint that a plan describes."""
