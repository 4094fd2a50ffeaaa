"""What sequences and interactions tell each other (InterFormer, arXiv 2411.09852, section 4.3).

  X_sum = Gating(MLP_n(X)), over units                    units -> sequences
  S_sum = Gating([first tokens | PMA(S) | newest tokens])  sequences -> units

Letters: B examples, N units, M summary units, D width, E tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gemjax.config import Attention
from gemjax.layers import tokens as tokens_lib
from gemjax.layers.attention import Pma
from gemjax.layers.gating import Gating
from gemjax.layers.interaction import UnitLinear
from gemjax.layers.tokens import Tokens
from pallas_kernels import jagged_to_dense


class UnitSummary(nnx.Module):
  """X_sum: (B, D, N) -> (B, M, D), gated W X or, with `mlp`, gated W_2 relu(W_1 X + b_1) + b_2.

  W_1 is (N, N): the paper says neither widths nor how many layers.
  """

  def __init__(
    self,
    units: int,
    outputs: int,
    dim: int,
    *,
    gating: str,
    mlp: bool,
    dtype: str,
    rngs: nnx.Rngs,
  ):
    make = {"dtype": dtype, "rngs": rngs, "bias": mlp}
    self.hidden = UnitLinear(units, units, **make) if mlp else None
    self.compress = UnitLinear(units, outputs, **make)
    self.gate = Gating(gating, dim, dtype=dtype, rngs=rngs)

  @jax.named_scope("unit_summary")
  def __call__(self, x_BDN: jax.Array) -> jax.Array:
    if self.hidden is not None:
      x_BDN = jax.nn.relu(self.hidden(x_BDN))
    return self.gate(rearrange(self.compress(x_BDN), "b d m -> b m d"))


class SequenceSummary(nnx.Module):
  """S_sum without its gate: (B, M, D), what leaves a sequence, M = `units`.

  Queries of the caller (X_sum) and learnt ones (PMA) attend in one pass over the same keys. Queries
  of the caller are ours.

  Args:
    attention: Of the pooling.
    dim: D.
    first: Tokens at the front of every sequence (CLS) that are passed on.
    cross: Queries that the caller brings; 0 for none.
    pma: Learnt queries.
    recent: Newest tokens that are passed on; zeros where there are fewer, `first` not counted.
  """

  def __init__(
    self,
    attention: Attention,
    dim: int,
    *,
    first: int = 0,
    cross: int = 0,
    pma: int = 0,
    recent: int = 0,
    dtype: str,
    rngs: nnx.Rngs,
  ):
    self.first, self.cross, self.recent = first, cross, recent
    self.units = first + cross + pma + recent
    pool = lambda: Pma(attention, dim, pma, dtype=dtype, rngs=rngs)
    self.pool = pool() if cross or pma else None

  @jax.named_scope("sequence_summary")
  def __call__(self, tokens: Tokens, query_BMD: jax.Array | None = None) -> jax.Array:
    parts = []
    if self.first:
      parts.append(jagged_to_dense(tokens.x_ED, tokens.offsets_B1, self.first))
    if self.pool is not None:
      parts.append(self.pool(tokens, query_BMD if self.cross else None))
    if self.recent:
      newest_BKD = tokens_lib.last(tokens, self.recent)
      length_B = jnp.diff(tokens.offsets_B1) - self.first
      there_BK = jnp.arange(self.recent, 0, -1) <= length_B[:, None]
      parts.append(jnp.where(there_BK[..., None], newest_BKD, 0))
    return jnp.concatenate(parts, 1)
