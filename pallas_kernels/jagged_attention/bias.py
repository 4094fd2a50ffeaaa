"""Additive bias of a score by how far its query and its key lie apart, in positions or in seconds.

    bias_ij = table[head, bucket(x_i - x_j)]

Distances fall into buckets that widen with them, 2^bits to each octave, by integers alone, so that
all implementations agree: with the distance d as a float32, its exponent and the first `bits` bits
of its mantissa are the bucket. Distances below 2^(bits + 1) have buckets of their own.

    bucket(0) = 0;   bucket(d) = 1 + (bits of float32(d) >> (23 - bits)) - (127 << bits)

T5 (arXiv 1910.10683, 2.1) and HSTU (arXiv 2402.17152, 3.2) widen theirs likewise, by logarithms;
`LinearBuckets` and `LogBuckets` are those of HSTU's published code.
Letters: H heads, N buckets, T queries, E keys.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, slots=True)
class Buckets:
  """How distances fall into the columns of a table.

  bits: 2^bits buckets an octave, 0 to 8.
  signed: Keys after the query have N / 2 buckets of their own, the second half of the table;
    otherwise only |d| counts.
  """

  bits: int = 1
  signed: bool = False

  def check(self, what: str, table_HN: jax.Array) -> None:
    """ValueError unless the table has a column for every direction and floats."""
    count = table_HN.shape[-1]
    if not isinstance(self.bits, int) or not 0 <= self.bits <= 8:
      raise ValueError(f"{what}: bits must lie in 0 to 8, is {self.bits}")
    if self.signed and count % 2:
      raise ValueError(f"{what}: columns must be even where signed; it has {count}")
    _check_table(what, table_HN)

  def __call__(self, distance: jax.Array, count: int) -> jax.Array:
    """The bucket of every int32 distance, among `count`; the last one holds all beyond it."""
    side = count // 2 if self.signed else count
    bits = jax.lax.bitcast_convert_type(_far(distance), jnp.int32)
    bucket = jnp.maximum((bits >> (23 - self.bits)) - (127 << self.bits) + 1, 0)
    bucket = jnp.minimum(bucket, side - 1)
    return jnp.where(distance < 0, bucket + side, bucket) if self.signed else bucket


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, slots=True)
class LinearBuckets:
  """bucket(d) = |d|."""

  def check(self, what: str, table_HN: jax.Array) -> None:
    """ValueError unless the table has columns of floats."""
    _check_table(what, table_HN)

  def __call__(self, distance: jax.Array, count: int) -> jax.Array:
    """The bucket of every int32 distance, among `count`; the last one holds all beyond it."""
    return jnp.minimum(jnp.abs(jnp.maximum(distance, -(2**31 - 1))), count - 1)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, slots=True)
class LogBuckets:
  """bucket(d) = floor(ln(max(1, |d|)) / width), in float32.

  Implementations may round the logarithm otherwise, and then differ by one bucket at its border.
  Source: RelativeBucketedTimeAndPositionBasedBias of generative-recommenders, whose width is .301.
  """

  width: float = 0.301

  def check(self, what: str, table_HN: jax.Array) -> None:
    """ValueError unless the width is positive and the table has columns of floats."""
    if not self.width > 0:
      raise ValueError(f"{what}: width must be positive, is {self.width}")
    _check_table(what, table_HN)

  def __call__(self, distance: jax.Array, count: int) -> jax.Array:
    """The bucket of every int32 distance, among `count`; the last one holds all beyond it."""
    bucket = (jnp.log(jnp.maximum(_far(distance), 1.0)) / self.width).astype(jnp.int32)
    return jnp.minimum(bucket, count - 1)


def _check_table(what: str, table_HN: jax.Array) -> None:
  if not table_HN.shape[-1]:
    raise ValueError(f"{what}: a table has at least one column; it has none")
  if not jnp.issubdtype(table_HN.dtype, jnp.floating):
    raise ValueError(f"{what}: a table must be of floats, is {table_HN.dtype}")


def _far(distance: jax.Array) -> jax.Array:
  """|distance| as float32; |-2^31| is no int32."""
  return jnp.abs(jnp.maximum(distance, -(2**31 - 1))).astype(jnp.float32)


class RelativeBias(NamedTuple):
  """One additive bias; its gradient goes to the table.

  table_HN: Of any float dtype.
  q_T, kv_E: int32 coordinates of queries and keys, such as seconds or positions; their differences
    must fit into int32.
  buckets: Static.
  """

  table_HN: jax.Array
  q_T: jax.Array
  kv_E: jax.Array
  buckets: Buckets | LinearBuckets | LogBuckets = Buckets()
