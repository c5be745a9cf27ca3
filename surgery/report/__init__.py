"""One page that shows what a cut keeps and loses: its figures, its tables, and its HTML."""
