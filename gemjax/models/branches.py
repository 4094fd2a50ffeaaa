"""The branches of GEM's pyramid: a history at a resolution, its layers, and what leaves them all.

Letters: B examples, M summary units, D width, E tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gemjax import config as config_lib
from gemjax.layers.dropout import Key
from gemjax.layers.exchange import SequenceSummary
from gemjax.layers.gating import Gating
from gemjax.layers.hstu import HstuBlock
from gemjax.layers.norm import LayerNorm
from gemjax.layers.personalised import PersonalisedFfn
from gemjax.layers.tokens import Tokens
from gemjax.layers.transformer import TransformerBlock


class Branch(NamedTuple):
  """Static: one history at one resolution."""

  history: str
  stride: int
  length: int  # Most tokens of an example.


def make_cell(
  config: config_lib.Gem, branch: Branch, dim: int, dtype: str, rngs: nnx.Rngs
) -> HstuBlock | TransformerBlock:
  """A causal block over the branch's tokens."""
  attention = config.fine if branch.stride == 1 else config.coarse
  make = {"dropout": config.dropout, "dtype": dtype, "rngs": rngs}
  if config.cell == "hstu":
    return HstuBlock(attention, dim, norm=branch.length, **make)
  return TransformerBlock(attention, dim, causal=True, hidden=2 * dim, **make)


class BranchLayer(nnx.Module):
  """One layer of one branch: S -> cell(S + LN(S) W(X_sum))."""

  def __init__(self, config: config_lib.Gem, branch: Branch, dim: int, dtype: str, rngs: nnx.Rngs):
    make = {"dtype": dtype, "rngs": rngs}
    personal = config.personalised and config.exchange
    self.norm = LayerNorm(dim, dtype, rngs) if personal else None
    self.personal = PersonalisedFfn(config.cls * dim, dim, **make) if personal else None
    self.cell = make_cell(config, branch, dim, **make)

  def __call__(self, tokens: Tokens, sum_BMD: jax.Array | None, key_B: Key) -> jax.Array:
    if self.personal is not None:
      normed = tokens._replace(x_ED=self.norm(tokens.x_ED))
      own_ED = self.personal(rearrange(sum_BMD, "b m d -> b (m d)"), normed)
      tokens = tokens._replace(x_ED=tokens.x_ED + own_ED)
    return self.cell(tokens, key_B)


class BranchSummary(nnx.Module):
  """(X_sum, sequences) -> S_sum of all branches; `outputs` counts its units."""

  def __init__(
    self, config: config_lib.Gem, branches: tuple[Branch, ...], dim: int, dtype: str, rngs
  ):
    make = {"dtype": dtype, "rngs": rngs}
    cross = (config.cls if config.cross else 0) + config.target
    summary = lambda b: SequenceSummary(
      config.coarse, dim, cross=cross, pma=config.pma,
      recent=config.recent if b.stride == 1 else 0, **make,
    )  # fmt: skip
    self.sequences = nnx.List([summary(b) for b in branches])
    self.gate = Gating(config.gating, dim, **make)
    self.outputs = sum(s.units for s in self.sequences)
    self.cross, self.target = config.cross, config.target

  def __call__(
    self, x_sum_BMD: jax.Array | None, sequences: list[Tokens], candidates: list[jax.Array]
  ) -> jax.Array:
    """`candidates` has the candidate's token (B, D) for every branch; X_sum is read for `cross`."""
    parts = []
    for summary, tokens, candidate_BD in zip(self.sequences, sequences, candidates):
      asked = [x_sum_BMD] if self.cross else []
      asked += [candidate_BD[:, None]] if self.target else []
      parts.append(summary(tokens, jnp.concatenate(asked, 1) if asked else None))
    return self.gate(jnp.concatenate(parts, 1))
