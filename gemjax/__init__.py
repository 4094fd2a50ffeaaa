"""Meta's GEM and Wukong ads rankers in JAX/Flax for NVIDIA GPUs."""
