"""Rows times the matrix of their segment."""
