"""Files as they lie on the disk: headers, JSON, atomic writes."""
