"""Run models one layer at a time: calibration, scores, equality. Never writes a checkpoint."""
