"""Train a pruned model back: the only place that holds a whole model in memory."""
