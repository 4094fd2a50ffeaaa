"""fm_interaction: a factorisation machine and its layer norm in one pass; see api.py."""
