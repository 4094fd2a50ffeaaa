"""Attention across layers: a layer reads what entered it and the layers before it.

Letters: B examples, N units, M queries, D width, L memories, K units of one.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gemjax.layers.attention import Projection
from gemjax.layers.interaction import UnitLinear
from gemjax.layers.norm import LayerNorm


class LayerMemory(nnx.Module):
  """A layer's part in the memory of all layers.

      read   softmax(W_q Q (W_k M)ᵀ / sqrt(d)) W_v M   over all units of the memories written
      write  M_i = LN(C X_i), C in R^{K x N}   X_i what enters layer i

  GEM's "cross-layer attention connections"; the formula is ours.
  """

  def __init__(self, units: int, memory_units: int, dim: int, *, dtype: str, rngs: nnx.Rngs):
    make = {"dtype": dtype, "rngs": rngs}
    self.compress = UnitLinear(units, memory_units, **make)
    self.norm = LayerNorm(dim, dtype, rngs)
    self.query = Projection(dim, dim, **make)
    self.keys_values = Projection(dim, 2 * dim, **make)
    self.dim = dim

  @jax.named_scope("memory")
  def read(self, query_BMD: jax.Array, memory_BLKD: jax.Array, written: jax.Array) -> jax.Array:
    """(B, M, D) from the first `written` memories."""
    k_BLKD, v_BLKD = jnp.split(self.keys_values(memory_BLKD), 2, axis=-1)
    score = jnp.einsum("bmd,blkd->bmlk", self.query(query_BMD), k_BLKD) / math.sqrt(self.dim)
    there_L1 = (jnp.arange(memory_BLKD.shape[1]) < written)[:, None]
    score = jnp.where(there_L1, score.astype(jnp.float32), -jnp.inf)
    flat = jax.nn.softmax(rearrange(score, "b m l k -> b m (l k)"), axis=-1)
    v_BED = rearrange(v_BLKD, "b l k d -> b (l k) d")
    return jnp.einsum("bme,bed->bmd", flat.astype(v_BED.dtype), v_BED)

  @jax.named_scope("memory")
  def write(self, x_BDN: jax.Array, memory_BLKD: jax.Array, at: jax.Array) -> jax.Array:
    """`memory_BLKD` with memory number `at`."""
    memory_BKD = self.norm(rearrange(self.compress(x_BDN), "b d k -> b k d"))
    return memory_BLKD.at[:, at].set(memory_BKD.astype(memory_BLKD.dtype))
