"""Which item comes next: blocks of attention over a user's events, and how well each item fits.

    X     = dropout(sqrt(D) I[item] + P[place])
    X     = block_l(X)                            for the layers l
    score = LN(X) . I[v] + b[v]                   of every event and item v, or
            cos(X, I[v]) / temperature

The item table I is input and output. Blocks are causal: the scores of an event know it and what
came before. Places count from the oldest event of a sequence, because the newest is another one
for every event that predicts.

Source: the public experiments of HSTU (arXiv 2402.17152, 4.1.1), there for both kinds of blocks.
Their score is the cosine; the other is that of language models with a popularity b: on ML-1M at
rate 1e-3 it reaches after 4 epochs what the cosine does after 9 (HR@10 of .15).

Letters: B users, E slots for events, D width, Q queries, V items, L places.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from gemjax.config.next_item import Tower
from gemjax.layers.dropout import Key, dropout, fold
from gemjax.layers.hstu import HstuBlock
from gemjax.layers.norm import LayerNorm
from gemjax.layers.public_hstu import PublicHstuBlock
from gemjax.layers.tokens import Tokens, event_keys, segment_E
from gemjax.layers.transformer import TransformerBlock

_LEAST = 1e-6  # Of a length that is divided by.


class NextItemTower(nnx.Module):
  """(item_E, age_E, offsets_B1) -> queries x_ED, for `score`.

  The cell public_hstu needs next_age_E as well, the age of the event after each.
  """

  def __init__(self, config: Tower, *, items: int, length: int, rngs: nnx.Rngs):
    born = lambda rows, scale: nnx.Param(
      scale * jax.random.truncated_normal(rngs.params(), -2, 2, (rows, config.dim)),
      axes=("width", "width"),
    )
    places = config.places or length
    self.item_VD, self.place_LD = born(items, 0.02), born(places, config.dim**-0.5)
    common = {"dropout": config.dropout, "dtype": "float32", "rngs": rngs}
    if config.cell == "hstu":
      block = lambda: HstuBlock(config.attention, config.dim, norm=places, **common)
    elif config.cell == "public_hstu":
      block = lambda: PublicHstuBlock(config.attention.heads, config.dim, places=places, **common)
    else:
      block = lambda: TransformerBlock(
        config.attention, config.dim, causal=True, hidden=config.hidden, **common
      )
    self.blocks = nnx.List([block() for _ in range(config.layers)])
    if config.score == "dot":
      self.norm = LayerNorm(config.dim, "float32", rngs)
      self.popularity_V = nnx.Param(jnp.zeros((items,)), axes=("width",))
    self.config = config

  def __call__(
    self, item_E, age_E, offsets_B1, key_B: Key = None, *, next_age_E: jax.Array | None = None
  ) -> jax.Array:
    x_ED = self.item_VD[item_E] * self.config.dim**0.5
    tokens = Tokens(x_ED, offsets_B1, age_E)
    place_E = jnp.arange(len(item_E)) - offsets_B1[segment_E(tokens)]
    x_ED = x_ED + self.place_LD.at[place_E].get(mode="clip")
    x_ED = dropout(x_ED, self.config.dropout, event_keys(fold(key_B, 0), tokens))
    asked = (next_age_E,) if self.config.cell == "public_hstu" else ()
    for i, block in enumerate(self.blocks):
      x_ED = block(tokens._replace(x_ED=x_ED), *asked, fold(key_B, 1 + i))
    return self.norm(x_ED) if self.config.score == "dot" else _of_length_1(x_ED)

  def score(self, x_QD: jax.Array, item: jax.Array | None = None) -> jax.Array:
    """score_QV of all items, or of `item`: V that all queries share, or (Q, V), V of each."""
    which = ... if item is None else item
    i = self.item_VD[which]
    cosine = self.config.score == "cosine"
    i = _of_length_1(i) if cosine else i
    product_QV = jnp.einsum("qd,vd->qv" if i.ndim == 2 else "qd,qvd->qv", x_QD, i)
    return product_QV / self.config.temperature if cosine else product_QV + self.popularity_V[which]


def _of_length_1(x: jax.Array) -> jax.Array:
  """x / |x|; its gradient is 0 where x is."""
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, _LEAST**2))
