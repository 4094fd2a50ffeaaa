"""Task heads: one MLP a task on a shared trunk."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from gemjax.layers.dropout import Key, fold
from gemjax.layers.mlp import Mlp


class Heads(nnx.Module):
  """x_BI -> logits_BT float32, task t by an MLP of its own."""

  def __init__(
    self,
    inputs: int,
    hidden: tuple[int, ...],
    tasks: int,
    dropout: float,
    dtype: str,
    rngs: nnx.Rngs,
  ):
    # Logits of eight bits would tie examples that a ranker must tell apart.
    make = lambda: Mlp(
      inputs, hidden, 1, dtype=dtype, rngs=rngs, dropout=dropout, last_dtype="float32"
    )
    self.heads = nnx.List([make() for _ in range(tasks)])

  def __call__(self, x_BI: jax.Array, key_B: Key = None) -> jax.Array:
    logits = [head(x_BI, fold(key_B, t)) for t, head in enumerate(self.heads)]
    return jnp.concatenate(logits, 1)
