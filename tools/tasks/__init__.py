"""Multiple-choice tasks of our own, for lm-evaluation-harness and anything that reads JSON."""
