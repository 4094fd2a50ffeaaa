"""Rows of a jagged array inside a Triton kernel: loads, stores, loops. Letters as in triton.py."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.jagged_attention.form import Form


@dataclasses.dataclass(frozen=True, slots=True)
class Launch:
  """Rows of a tile of queries and of keys, warps of a program, stages of its software pipeline."""

  queries: int
  keys: int
  warps: int
  stages: int


def power(width: int) -> int:
  return max(16, pl.next_power_of_2(width))


class Rows:
  """Rows of a tile: loads them as zeros where they are not its own, and stores only its own."""

  def __init__(self, start, stop, count: int, head, width: int):
    self.row_B = start + jnp.arange(count, dtype=jnp.int32)
    self.own_B = self.row_B < stop
    self.head, self.width = head, width

  def _place(self, ref):
    padded = power(self.width)
    column_W = jnp.arange(padded, dtype=jnp.int32)
    mask = self.own_B[:, None]
    if padded != self.width:
      mask = mask & (column_W < self.width)[None, :]
    return ref.at[self.row_B[:, None], self.head, column_W[None, :]], mask

  def load(self, ref):
    """(B, W) of a (T, H, D) array."""
    place, mask = self._place(ref)
    return plgpu.load(place, mask=mask, other=0)

  def store(self, ref, x_BW):
    place, mask = self._place(ref)
    plgpu.store(place, x_BW.astype(ref.dtype), mask=mask)

  def of_vector(self, ref):
    """(B,) of a (T,) array."""
    return plgpu.load(ref.at[self.row_B], mask=self.own_B, other=0)

  def of_heads(self, ref):
    """(B,) of a (H, T) array."""
    return plgpu.load(ref.at[self.head, self.row_B], mask=self.own_B, other=0)


def over(first, last, block: int, body, carry):
  """carry = body(start of a tile, carry) from first to last, which need not divide by `block`."""
  # Not pl.cdiv, which mixes int32 and int64 where 64-bit integers are switched on.
  trips = jax.lax.div(last - first + (block - 1), jnp.int32(block))
  return jax.lax.fori_loop(jnp.int32(0), trips, lambda j, c: body(first + j * block, c), carry)


def biased_score(form: Form, score, tables, head, x_qs, x_ks):
  """(score with biases, bucket of every pair and bias)."""
  found = []
  for buckets, table_ref, x_q, x_k in zip(form.biases, tables, x_qs, x_ks):
    bucket = buckets(x_q - x_k, table_ref.shape[1])
    score += plgpu.load(table_ref.at[head, bucket]).astype(jnp.float32)
    found.append(bucket)
  return score, found


def ids(heads: int):
  # Heads lie beside each other in memory: neighbours in time share lines of the cache.
  program = pl.program_id(0)
  return program // heads, program % heads


def split(rest, biased: int):
  """(tables, query coordinates, key coordinates, outputs)."""
  return rest[:biased], rest[biased : 2 * biased], rest[2 * biased : 3 * biased], rest[3 * biased :]
