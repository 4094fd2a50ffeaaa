"""Pallas GPU kernels for jagged user sequences (none yet)."""
