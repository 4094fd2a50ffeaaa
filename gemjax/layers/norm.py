"""Layer norm whose parameters name their axes."""

from __future__ import annotations

from flax import nnx


def layer_norm(width: int, dtype: str, rngs: nnx.Rngs) -> nnx.LayerNorm:
  """(x - mean) / sqrt(var + 1e-6) * gain + bias over the last axis; moments in float32."""
  axes = {"axes": ("width",)}
  return nnx.LayerNorm(width, dtype=dtype, rngs=rngs, scale_metadata=axes, bias_metadata=axes)
