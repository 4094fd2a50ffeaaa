"""Dropout with explicit keys, one an example: without them, a layer is deterministic.

The mask of an example depends on its own key alone, so that it is the same on whichever device
the example lies.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Key = jax.Array | None  # (B,) keys.


def example_keys(key: jax.Array, first: jax.Array | int, count: int) -> jax.Array:
  """(count,) keys of the examples first, first + 1, .. of the global batch."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(count))


def fold(key_B: Key, index: jax.Array | int) -> Key:
  """The keys of part `index` of a module, or None."""
  return None if key_B is None else jax.vmap(jax.random.fold_in, (0, None))(key_B, index)


def dropout(x: jax.Array, rate: float, key_B: Key) -> jax.Array:
  """x * Bernoulli(1 - rate) / (1 - rate), element by element (Srivastava et al. 2014)."""
  return _drop(x, x.shape[1:], rate, key_B)


def unit_dropout(x_BND: jax.Array, rate: float, key_B: Key) -> jax.Array:
  """Dropout of whole units, so that no prediction leans on one feature alone."""
  return _drop(x_BND, (x_BND.shape[1], 1), rate, key_B)


def _drop(x: jax.Array, shape: tuple[int, ...], rate: float, key_B: Key) -> jax.Array:
  """`shape` is that of one example's mask."""
  if key_B is None or rate == 0:
    return x
  keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape))(key_B)
  return jnp.where(keep, x / (1 - rate), 0)
