"""Derive the table of model types from the installed transformers."""
