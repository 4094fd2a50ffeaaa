"""Jagged arrays side by side."""
