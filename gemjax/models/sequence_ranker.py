"""Rankers that read a history as one causal sequence with the candidate as its newest token.

  SASRec  transformer blocks (Kang and McAuley 2018, arXiv 1808.09781)
  HSTU    HSTU blocks (Zhai et al. 2024, arXiv 2402.17152)

ŷ = MLP([flatten(X0) | h]), h the last layer's output at the candidate, one a history. HSTU ranks
candidates inside the sequence like this; for SASRec, and the other features beside h, it is ours.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gemjax import config as config_lib
from gemjax.layers import tokens as tokens_lib
from gemjax.layers.dropout import Key, fold
from gemjax.layers.events import EventInput, EventRows, HistorySpec
from gemjax.layers.hstu import HstuBlock
from gemjax.layers.norm import LayerNorm
from gemjax.layers.transformer import TransformerBlock
from gemjax.models.heads import Heads


class SequenceRanker(nnx.Module):
  """(X0, histories) -> one logit a task; see the module's docstring."""

  def __init__(
    self,
    config: config_lib.Sasrec | config_lib.Hstu,
    *,
    units: int,
    dim: int,
    tasks: int,
    histories: tuple[HistorySpec, ...],
    dtype: str,
    rngs: nnx.Rngs,
  ):
    make = {"dropout": config.dropout, "dtype": dtype, "rngs": rngs}

    def block(history: HistorySpec) -> nnx.Module:
      if isinstance(config, config_lib.Hstu):
        return HstuBlock(config.attention, dim, norm=history.length + 1, **make)
      return TransformerBlock(config.attention, dim, causal=True, hidden=config.hidden, **make)

    self.names = tuple(h.name for h in histories)
    self.events = nnx.List([EventInput(h, dim, dtype=dtype, rngs=rngs) for h in histories])
    stack = lambda history: nnx.List([block(history) for _ in range(config.layers)])
    self.stacks = nnx.List([stack(h) for h in histories])
    self.norms = nnx.List([LayerNorm(dim, dtype, rngs) for _ in histories])
    inputs = (units + len(histories)) * dim
    self.heads = Heads(inputs, config.head, tasks, config.dropout, dtype, rngs)

  def __call__(
    self, x_BND: jax.Array, histories: dict[str, EventRows], key_B: Key = None
  ) -> jax.Array:
    parts = [rearrange(x_BND, "b n d -> b (n d)")]
    for i, name in enumerate(self.names):
      events = self.events[i]
      candidate = tokens_lib.dense(events.candidate(x_BND)[:, None])
      tokens = tokens_lib.concat(events(histories[name]), candidate)
      for layer, block in enumerate(self.stacks[i]):
        tokens = tokens._replace(x_ED=block(tokens, fold(fold(key_B, i), layer)))
      parts.append(self.norms[i](tokens_lib.last(tokens, 1)[:, 0]))
    return self.heads(jnp.concatenate(parts, 1), fold(key_B, len(self.names)))
