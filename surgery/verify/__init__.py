"""Check an output against its plan and its source."""
