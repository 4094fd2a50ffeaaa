"""Rows of a table looked up and pooled, bag by bag."""
