"""Text as windows: of tokens for calibration, of bytes for scores."""
