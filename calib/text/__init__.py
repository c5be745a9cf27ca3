"""Windows of text: of tokens for calibration, of bytes for scores."""
