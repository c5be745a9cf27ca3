"""TEXT as documents: files, data sets and iterables, row by row."""
