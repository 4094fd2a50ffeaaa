"""Segments of jagged arrays pooled: sum, mean, maximum, or the last rows."""
