"""Deep interest network (Zhou et al. 2018, arXiv 1706.06978): events weighed by the candidate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gemjax import config as config_lib
from gemjax.layers.dropout import Key
from gemjax.layers.events import EventInput, EventRows, HistorySpec
from gemjax.layers.interest import Interest
from gemjax.models.heads import Heads


class Din(nnx.Module):
  """ŷ = MLP([flatten(X0) | v | c]), c the candidate as a token, v its `Interest` in the events."""

  def __init__(
    self,
    config: config_lib.Din,
    *,
    units: int,
    dim: int,
    tasks: int,
    histories: tuple[HistorySpec, ...],
    dtype: str,
    rngs: nnx.Rngs,
  ):
    make = {"dtype": dtype, "rngs": rngs}
    self.names = tuple(h.name for h in histories)
    self.events = nnx.List([EventInput(h, dim, **make) for h in histories])
    self.interests = nnx.List([Interest(config.hidden, dim, **make) for _ in histories])
    inputs = (units + 2 * len(histories)) * dim
    self.heads = Heads(inputs, config.head, tasks, config.dropout, dtype, rngs)

  def __call__(
    self, x_BND: jax.Array, histories: dict[str, EventRows], key_B: Key = None
  ) -> jax.Array:
    parts = [rearrange(x_BND, "b n d -> b (n d)")]
    for name, events, interest in zip(self.names, self.events, self.interests):
      candidate_BD = events.candidate(x_BND)
      parts += [interest(events(histories[name]), candidate_BD), candidate_BD]
    return self.heads(jnp.concatenate(parts, 1), key_B)
