"""Tokenizers: read, check and rewrite them through the id map."""
