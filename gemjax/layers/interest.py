"""What a history says of a candidate (DIN, Zhou et al. 2018, arXiv 1706.06978, section 4.3).

Letters: B examples, D width, E tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from gemjax.layers import tokens as tokens_lib
from gemjax.layers.mlp import Mlp
from gemjax.layers.tokens import Tokens


class Interest(nnx.Module):
  """v = sum_e a(e, c) e over the events e, a = MLP([e, c, e - c, e * c]), not normalised: (B, D).

  As in the BARS implementation the MLP sees differences and products instead of an outer product;
  ReLU instead of Dice. With `mean` v is divided by the number of events, which is ours.
  """

  def __init__(
    self, hidden: tuple[int, ...], dim: int, *, mean: bool = False, dtype: str, rngs: nnx.Rngs
  ):
    self.weigh = Mlp(4 * dim, hidden, 1, dtype=dtype, rngs=rngs)
    self.pool = tokens_lib.mean if mean else tokens_lib.total

  @jax.named_scope("interest")
  def __call__(self, tokens: Tokens, candidate_BD: jax.Array) -> jax.Array:
    e_ED, c_ED = tokens.x_ED, tokens_lib.spread(candidate_BD, tokens)
    weight_E1 = self.weigh(jnp.concatenate([e_ED, c_ED, e_ED - c_ED, e_ED * c_ED], 1))
    return self.pool(tokens._replace(x_ED=weight_E1 * e_ED))
