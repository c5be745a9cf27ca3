"""Models on the hub: fetched file by file, read by ranges, uploaded."""
