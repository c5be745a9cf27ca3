"""A checkpoint directory: headers, checksums, quantization."""
