"""Deep interest network (Zhou et al. 2018, arXiv 1706.06978): events weighed by the candidate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gemjax import config as config_lib
from gemjax.layers import tokens as tokens_lib
from gemjax.layers.dropout import Key
from gemjax.layers.events import EventInput, EventRows, HistorySpec
from gemjax.layers.mlp import Mlp
from gemjax.models.heads import Heads


class Din(nnx.Module):
  """v = sum_e a(e, c) e over the events e, a = MLP([e, c, e - c, e * c]), not normalised;
  ŷ = MLP([flatten(X0) | v | c]) with the candidate c as a token.

  Source: section 4.3; as in the BARS implementation the MLP sees differences and products instead
  of an outer product. ReLU instead of Dice.
  """

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
    self.weights = nnx.List([Mlp(4 * dim, config.hidden, 1, **make) for _ in histories])
    inputs = (units + 2 * len(histories)) * dim
    self.heads = Heads(inputs, config.head, tasks, config.dropout, dtype, rngs)

  def __call__(
    self, x_BND: jax.Array, histories: dict[str, EventRows], key_B: Key = None
  ) -> jax.Array:
    parts = [rearrange(x_BND, "b n d -> b (n d)")]
    for name, events, weigh in zip(self.names, self.events, self.weights):
      tokens, candidate_BD = events(histories[name]), events.candidate(x_BND)
      e_ED, c_ED = tokens.x_ED, tokens_lib.spread(candidate_BD, tokens)
      weight_E1 = weigh(jnp.concatenate([e_ED, c_ED, e_ED - c_ED, e_ED * c_ED], 1))
      interest_BD = tokens_lib.total(tokens._replace(x_ED=weight_E1 * e_ED))
      parts += [interest_BD, candidate_BD]
    return self.heads(jnp.concatenate(parts, 1), key_B)
