"""Try several variants of one model on one text."""
