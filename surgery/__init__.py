"""Edit checkpoint files: headers, plans, vocabulary and channel surgery. Never runs a model."""

__version__ = "0.1.0"
