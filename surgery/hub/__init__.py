"""Models of the hub: fetched file by file, read by ranges, uploaded."""
