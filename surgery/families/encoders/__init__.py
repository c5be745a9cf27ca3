"""The entries of models that read a text as a whole: encoders, and encoders with a decoder."""
