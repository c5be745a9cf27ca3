"""Files on the disk: headers, JSON, shards, atomic writes."""
