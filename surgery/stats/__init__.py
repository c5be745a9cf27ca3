"""Channel statistics: their file, the channels they choose, their sum."""
