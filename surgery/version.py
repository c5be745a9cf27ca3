"""The version, in one place below everything that names it."""

__version__ = "0.1.0"
