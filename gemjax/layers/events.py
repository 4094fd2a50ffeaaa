"""Events of a history on their way into a model: units of width D, then one token an event.

Letters: B examples, E events, F units of an event, N units of an example, D width, A buckets of
age.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gemjax.layers import tokens as tokens_lib
from gemjax.layers.linear import KERNEL, contract
from gemjax.layers.masknet import MaskNet
from gemjax.layers.norm import LayerNorm
from gemjax.layers.tokens import Tokens

AGES = 64  # Buckets, two an octave: the last begins at 2^31.5 seconds, beyond all ages.


class HistorySpec(NamedTuple):
  """What is static about a history."""

  name: str
  units: int  # F
  length: int  # Most events of an example.
  candidate: tuple[int, ...]  # (F,) The unit of the example that each corresponds to, -1 for none.
  ages: bool = True  # Whether tokens say how old their events are.


class EventRows(NamedTuple):
  """The looked-up events of a batch."""

  units_EFD: jax.Array
  age_E: jax.Array  # int32, seconds.
  lengths_B: jax.Array  # int32


def pooled(rows: EventRows) -> jax.Array:
  """(B, F, D): the mean of every unit over an example's events, zeros where it has none."""
  flat_ED = rearrange(rows.units_EFD, "e f d -> e (f d)")
  mean_BD = tokens_lib.mean(tokens_lib.of_lengths(flat_ED, rows.lengths_B, rows.age_E))
  return rearrange(mean_BD, "b (f d) -> b f d", f=rows.units_EFD.shape[1])


class EventInput(nnx.Module):
  """token = LN(MaskNet(units of the event) + embedding of bucket(age)).

  bucket(age) = floor(2 log2(1 + age)), its embeddings born at zero, so that an age that training
  never saw says nothing; none where the history's `ages` is off. The candidate becomes a token by
  the same map, as an event of age 0 whose unknown columns (its action, say) are zeros.

  Source: InterFormer, section 4.1, for MaskNet; age and candidate are ours.
  """

  def __init__(self, spec: HistorySpec, dim: int, *, dtype: str, rngs: nnx.Rngs):
    self.mask_net = MaskNet(spec.units, dim, dtype=dtype, rngs=rngs)
    rngs.params()  # Weights drawn later keep the values that they had.
    self.age_AD = nnx.Param(jnp.zeros((AGES, dim)), axes=KERNEL) if spec.ages else None
    self.norm = LayerNorm(dim, dtype, rngs)
    self.places, self.dtype = spec.candidate, dtype

  @jax.named_scope("events")
  def __call__(self, rows: EventRows) -> Tokens:
    x_ED = self._tokens(rows.units_EFD, rows.age_E)
    return tokens_lib.of_lengths(x_ED, rows.lengths_B, rows.age_E)

  def candidate(self, x_BND: jax.Array) -> jax.Array:
    """(B, D): the candidate as a token."""
    empty_BD = jnp.zeros_like(x_BND[:, 0])
    units = [empty_BD if place < 0 else x_BND[:, place] for place in self.places]
    return self._tokens(jnp.stack(units, 1), jnp.zeros(len(x_BND), jnp.int32))

  def _tokens(self, units_EFD: jax.Array, age_E: jax.Array) -> jax.Array:
    x_ED = self.mask_net(rearrange(units_EFD.astype(self.dtype), "e f d -> e (f d)"))
    if self.age_AD is None:
      return self.norm(x_ED)
    # As a product, and not as rows: its gradient needs no atomic adds to a few hot rows.
    bucket_E = jnp.floor(2 * jnp.log2(1 + age_E.astype(jnp.float32))).astype(jnp.int32)
    one_hot_EA = jax.nn.one_hot(jnp.minimum(bucket_E, AGES - 1), AGES, dtype=self.dtype)
    age_ED = contract("ea,ad->ed", one_hot_EA, self.age_AD[...], AGES, self.dtype)
    return self.norm(x_ED + age_ED)
