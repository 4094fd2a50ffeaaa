"""Programs compiled for GPUs that are not here, and what is read from their machine code."""
