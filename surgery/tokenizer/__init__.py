"""Tokenizers: read, checked, rewritten through the id map."""
