"""Event sequences of a batch, side by side without padding, and what is done to them as such.

Letters: B examples, E slots for events, D width, M tokens or newest events an example, R groups.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange

from gemjax.layers.dropout import Key
from pallas_kernels import jagged_concat, jagged_pool


class Tokens(NamedTuple):
  """Example b has the slots [offsets_B1[b], offsets_B1[b + 1]), oldest event first.

  Slots behind offsets_B1[B] are room: they may hold anything finite, and nobody reads them.
  """

  x_ED: jax.Array
  offsets_B1: jax.Array  # int32, from 0.
  age_E: jax.Array  # int32, seconds from the event to its example.


def of_lengths(x_ED: jax.Array, lengths_B: jax.Array, age_E: jax.Array) -> Tokens:
  """Tokens of a batch, whose examples lie one behind the other from slot 0 on."""
  return Tokens(x_ED, _offsets(lengths_B), age_E)


def dense(x_BMD: jax.Array, age: int = 0) -> Tokens:
  """M tokens of every example, all of one age."""
  B, M, _ = x_BMD.shape
  offsets_B1 = M * jnp.arange(B + 1, dtype=jnp.int32)
  return Tokens(
    rearrange(x_BMD, "b m d -> (b m) d"), offsets_B1, jnp.full((B * M,), age, jnp.int32)
  )


def concat(first: Tokens, second: Tokens) -> Tokens:
  """Every example's tokens of `first` in front of those of `second`; E is the sum of both."""
  x_ED, offsets_B1 = jagged_concat((first.x_ED, second.x_ED), (first.offsets_B1, second.offsets_B1))
  segment_E, place_E = _places(offsets_B1, len(x_ED))
  behind_E = place_E - jnp.diff(first.offsets_B1)[segment_E]
  ages = [
    of.age_E.at[of.offsets_B1[segment_E] + place].get(mode="clip")
    for of, place in ((first, place_E), (second, behind_E))
  ]
  return Tokens(x_ED, offsets_B1, jnp.where(behind_E < 0, *ages))


def coarsen(tokens: Tokens, stride: int) -> Tokens:
  """The mean of every `stride` neighbours as one token, as old as the newest of them.

  Groups are counted from the newest event back, so that only an example's oldest may be smaller.
  Each example wastes less than one: there is room for R = E // stride + B groups.
  """
  B, E = len(tokens.offsets_B1) - 1, len(tokens.x_ED)
  R = E // stride + B
  offsets_B1 = _offsets(-(-jnp.diff(tokens.offsets_B1) // stride))
  segment_R, place_R = _places(offsets_B1, R)
  end_R = tokens.offsets_B1[segment_R + 1]
  start_R = end_R - stride * (offsets_B1[segment_R + 1] - offsets_B1[segment_R] - place_R)
  start_R = jnp.maximum(start_R, tokens.offsets_B1[segment_R])
  events = tokens.offsets_B1[-1]
  start_R = jnp.where(jnp.arange(R) < offsets_B1[-1], start_R, events)
  start_R1 = jnp.append(start_R, events)
  x_RD = jagged_pool(tokens.x_ED, start_R1, mode="mean")
  return Tokens(x_RD, offsets_B1, tokens.age_E.at[start_R1[1:] - 1].get(mode="clip"))


def mean(tokens: Tokens) -> jax.Array:
  """(B, D): the mean over an example's events; 0 where it has none."""
  return jagged_pool(tokens.x_ED, tokens.offsets_B1, mode="mean")


def total(tokens: Tokens) -> jax.Array:
  """(B, D): the sum over an example's events; 0 where it has none."""
  return jagged_pool(tokens.x_ED, tokens.offsets_B1, mode="sum")


@jax.custom_vjp
def spread(x_BD: jax.Array, tokens: Tokens) -> jax.Array:
  """x_ED: every event's row of its example, 0 where it has none.

  Its gradient is the sum over segments: no atomic adds where events of an example meet.
  """
  return x_BD.at[segment_E(tokens)].get(mode="fill", fill_value=0, indices_are_sorted=True)


def _spread_forward(x_BD, tokens):
  return spread(x_BD, tokens), tokens


def _spread_backward(tokens, grad_ED):
  grads = Tokens(jnp.zeros_like(tokens.x_ED), None, None)
  return total(tokens._replace(x_ED=grad_ED)), grads


spread.defvjp(_spread_forward, _spread_backward)


def last(tokens: Tokens, count: int) -> jax.Array:
  """(B, M, D): the newest `count` events of every example, zeros in front where there are fewer."""
  return jagged_pool(tokens.x_ED, tokens.offsets_B1, mode="last", k=count)


def segment_E(tokens: Tokens) -> jax.Array:
  """int32: the example of every slot, B where it has none."""
  return _segments(tokens.offsets_B1, len(tokens.x_ED))


def recency_E(tokens: Tokens) -> jax.Array:
  """int32: how many events of its example are newer; anything for slots of no example."""
  segment_E, place_E = _places(tokens.offsets_B1, len(tokens.x_ED))
  return jnp.diff(tokens.offsets_B1)[segment_E] - 1 - place_E


def event_keys(key_B: Key, tokens: Tokens) -> Key:
  """A key for every slot, of its example's key and the event's recency; None of None.

  So that a draw depends neither on the device nor on the other examples of the batch.
  """
  if key_B is None:
    return None
  key_E = key_B.at[segment_E(tokens)].get(mode="clip")
  return jax.vmap(jax.random.fold_in)(key_E, recency_E(tokens))


def _offsets(lengths_B: jax.Array) -> jax.Array:
  return jnp.pad(jnp.cumsum(lengths_B, dtype=jnp.int32), (1, 0))


def _segments(offsets_B1: jax.Array, slots: int) -> jax.Array:
  ends_E = jnp.zeros((slots,), jnp.int32).at[offsets_B1[1:]].add(1, mode="drop")
  return jnp.cumsum(ends_E, dtype=jnp.int32)


def _places(offsets_B1: jax.Array, slots: int) -> tuple[jax.Array, jax.Array]:
  """The example of every slot and its place there, oldest 0; room counts on from the last."""
  segment_E = jnp.minimum(_segments(offsets_B1, slots), len(offsets_B1) - 2)
  return segment_E, jnp.arange(slots, dtype=jnp.int32) - offsets_B1[segment_E]
