"""Which event comes next: an objective of its own for a history, with no label but the past.

Letters: B examples, E slots for events, D width, K other events.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemjax.layers import tokens as tokens_lib
from gemjax.layers.linear import Linear
from gemjax.layers.norm import LayerNorm
from gemjax.layers.tokens import Tokens

OTHERS = 128  # K
_NONE = -1e30  # A score whose exp is 0; with -inf for all the gradient would be 0 / 0.


class Next(nnx.Intermediate):
  """`NextEvents` of a model's histories, for who trains it."""


class NextEvents(NamedTuple):
  """Of one history of a batch or of a part of it."""

  asks_ED: jax.Array  # float32, what an event says of the one behind it.
  item_ED: jax.Array  # float32
  followed_E: jax.Array  # Whether the slot behind it is of the same example.
  newest_BD: jax.Array  # The item of every example's last event.
  length_B: jax.Array  # int32, how many it has.


class NextEvent(nnx.Module):
  """(tokens, items) -> `NextEvents`: an event asks sqrt(D) (LN(x_e) W + b), of width D.

  x_e must know the events up to e alone. What an event's item is, is the caller's to say.
  """

  def __init__(self, dim: int, *, dtype: str, rngs: nnx.Rngs):
    self.norm = LayerNorm(dim, dtype, rngs)
    self.ask = Linear(dim, dim, dtype=dtype, rngs=rngs)

  @jax.named_scope("next_event")
  def __call__(self, tokens: Tokens, item_ED: jax.Array) -> NextEvents:
    E, D = tokens.x_ED.shape
    asks_ED = self.ask(self.norm(tokens.x_ED)).astype(jnp.float32) * D**0.5
    item_ED = item_ED.astype(jnp.float32)
    length_B, last_B = jnp.diff(tokens.offsets_B1), tokens.offsets_B1[1:] - 1
    last_B = jnp.where(length_B > 0, last_B, E)
    ends_E = jnp.zeros(E, bool).at[last_B].set(True, mode="drop")
    followed_E = (jnp.arange(E) < tokens.offsets_B1[-1]) & ~ends_E
    newest_BD = tokens_lib.last(tokens._replace(x_ED=item_ED), 1)[:, 0]
    return NextEvents(asks_ED, item_ED, followed_E, newest_BD, length_B)


def others(of: NextEvents, axes: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
  """(items_KD, there_K): the newest events of K examples of the batch whose parts lie on the mesh's
  `axes`: of those that have any, the K of least hash of item and length. So they do not depend on
  the order of examples, nor on how many parts the batch has, and differ from step to step.
  """
  B = len(of.length_B)
  hash_N = jax.lax.all_gather(_hash(of), axes, tiled=True)
  # Equal hashes keep their order, but are of equal items.
  rank_N = jnp.zeros(len(hash_N), jnp.int32).at[jnp.argsort(hash_N)].set(jnp.arange(len(hash_N)))
  place_B = jax.lax.dynamic_slice(rank_N, (jax.lax.axis_index(axes) * B,), (B,))

  def least(x):
    own = jnp.zeros((OTHERS, *x.shape[1:]), x.dtype).at[place_B].set(x, mode="drop")
    return jax.lax.psum(own, axes)

  return least(of.newest_BD), least((of.length_B > 0).astype(jnp.int32)) > 0


def _hash(of: NextEvents) -> jax.Array:
  """hash_B, uint32: the bits of item and length times odd numbers, summed, then mixed by the
  finalizer of MurmurHash3; the largest of all where there is no event.
  """
  bits_BD = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(of.newest_BD), jnp.uint32)
  odd_D = np.random.default_rng(0).integers(2**32, size=bits_BD.shape[1], dtype=np.uint32) | 1
  hash_B = (bits_BD * odd_D).sum(1, dtype=jnp.uint32) + of.length_B.astype(jnp.uint32)
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
    hash_B = (hash_B ^ hash_B >> shift) * jnp.uint32(factor)
  return jnp.where(of.length_B > 0, hash_B >> 1, jnp.uint32(2**32 - 1))


def next_event_loss(
  of: NextEvents, items_KD: jax.Array, there_K: jax.Array, total: jax.Array
) -> jax.Array:
  """-sum_e log(exp s_e / (exp s_e + sum_k exp s_ek)) / total, in nats; a scalar.

  s_e = asks_e . item_{e+1}, s_ek = asks_e . items_k, over the events e that have a next one, of
  which the whole batch has `total`: parts add up. Others come as often as they are frequent, so
  that what is learnt is how much more likely than that an event follows; the next one itself may
  be among them.

  Source: the sampled softmax of SASRec's successors, with negatives of the batch as in Yi et al.
  2019 (RecSys), uncorrected; as a second objective of a ranker DIEN's (arXiv 1809.03672, 4.2).
  """
  next_E = jnp.vecdot(of.asks_ED[:-1], of.item_ED[1:])
  other_EK = jnp.where(there_K, of.asks_ED[:-1] @ items_KD.T, _NONE)
  all_E = jnp.logaddexp(next_E, jax.nn.logsumexp(other_EK, axis=1))
  return jnp.where(of.followed_E[:-1], all_E - next_E, 0).sum() / jnp.maximum(total, 1)
