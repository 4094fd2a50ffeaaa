"""What a history says of a candidate (DIN, Zhou et al. 2018, arXiv 1706.06978, section 4.3).

Letters: B examples, D width, E tokens, H hidden.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from gemjax.layers import tokens as tokens_lib
from gemjax.layers.linear import contract
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
    self.pool, self.dtype = tokens_lib.mean if mean else tokens_lib.total, dtype

  @jax.named_scope("interest")
  def __call__(self, tokens: Tokens, candidate_BD: jax.Array) -> jax.Array:
    """The first map of four parts takes two: e (W_e + W_-) + (e * c) W_* + c (W_c - W_-)."""
    first = self.weigh.layers[0]
    w_e_DH, w_c_DH, w_difference_DH, w_product_DH = jnp.split(first.whole(), 4)
    w_IH = jnp.concatenate([w_e_DH + w_difference_DH, w_product_DH])
    own_BH = contract("bd,dh->bh", candidate_BD, w_c_DH - w_difference_DH, len(w_c_DH), self.dtype)
    own_BH += first.bias[...].astype(self.dtype)
    e_ED, c_ED = tokens.x_ED, tokens_lib.spread(candidate_BD, tokens)
    x_EI = jnp.concatenate([e_ED, e_ED * c_ED], 1)
    h_EH = contract("ei,ih->eh", x_EI, w_IH, len(w_IH), self.dtype)
    h_EH += tokens_lib.spread(own_BH, tokens)
    return self.pool(tokens._replace(x_ED=self.weigh.behind(h_EH) * e_ED))
