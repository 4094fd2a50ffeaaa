"""Jagged arrays to padded ones and back."""
