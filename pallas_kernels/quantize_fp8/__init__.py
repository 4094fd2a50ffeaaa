"""Saved activations in 8 bits."""
