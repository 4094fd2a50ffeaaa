"""Random bits that depend on a key and on an element's place alone: the same in XLA and in kernels.

A counter-based hash, so a kernel needs no state and no order of its elements: two finalisers of
three multiplications (triple32 of Wellons' hash prospector), a word of the key added before each.
About 13 integer instructions an element, the same a row, a fraction of Threefry's; good enough for
rounding, and not for secrets. Its test finds no more than chance: each of the 32 bits is set half
the time, nothing correlates among neighbours, keys or bits, and one bit of the place or the key
changes half of the noise. Two elements have the same noise as often as 2^32 values allow.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def words_of(op: str, key: jax.Array) -> jax.Array:
  """(2,) uint32 that stand for the key; ValueError unless it is one of `jax.random.key`."""
  if not jax.dtypes.issubdtype(getattr(key, "dtype", None), jax.dtypes.prng_key) or key.shape:
    raise ValueError(f"{op}: key must be one jax.random.key, is {jax.typeof(key)}")
  return jax.random.bits(key, (2,), jnp.uint32)


def random_bits(word_0: jax.Array, word_1: jax.Array, row: jax.Array, column: jax.Array):
  """uint32 noise of the element (row, column), of the shape that both broadcast to."""
  row, column = row.astype(jnp.uint32), column.astype(jnp.uint32)
  return _triple32((_triple32(row + word_0) ^ column) + word_1)


def _triple32(x: jax.Array) -> jax.Array:
  x = (x ^ (x >> np.uint32(17))) * np.uint32(0xED5AD4BB)
  x = (x ^ (x >> np.uint32(11))) * np.uint32(0xAC4C1B51)
  x = (x ^ (x >> np.uint32(15))) * np.uint32(0x31848BAB)
  return x ^ (x >> np.uint32(14))
