"""Rows of a jagged array inside a Triton kernel: loads, stores, loops. Letters as in triton.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.jagged_attention.activation import Sigmoid, sigmoid_by
from pallas_kernels.jagged_attention.form import Form

LOG2_E = 1.4426950408889634


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

  def load(self, ref, all_own: bool = False):
    """(B, W) of a (T, H, D) array."""
    place, mask = self._place(ref)
    if all_own and power(self.width) == self.width:
      return plgpu.load(place)
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


class Stretch(NamedTuple):
  """Of the other axis what a tile visits, and the part of it of which it sees all."""

  first: jax.Array
  last: jax.Array
  inner_first: jax.Array
  inner_last: jax.Array

  def over(self, block: int, body, carry, divided: bool = True):
    """carry = body(start, whether all is seen, carry), tile by tile of `block` rows.

    One loop over those in the middle, which need no masks, and one over the others; where not
    `divided`, one over all.
    """
    # Not pl.cdiv, which mixes int32 and int64 where 64-bit integers are switched on.
    up = lambda rows: jax.lax.div(rows + (block - 1), jnp.int32(block))
    trips = up(self.last - self.first)
    step = lambda j, inner, carry: body(self.first + j * block, inner, carry)
    zero = jnp.int32(0)
    if not divided:
      return jax.lax.fori_loop(zero, trips, lambda j, c: step(j, False, c), carry)
    begin = up(self.inner_first - self.first)
    end = jnp.maximum(begin, jax.lax.div(self.inner_last - self.first, jnp.int32(block)))
    carry = jax.lax.fori_loop(begin, end, lambda j, c: step(j, True, c), carry)
    around = lambda i: jnp.where(i < begin, i, i - begin + end)
    return jax.lax.fori_loop(
      zero, begin + trips - end, lambda i, c: step(around(i), False, c), carry
    )


def lean(ref, biased: int) -> bool:
  """Whether registers suffice for two loops: float32 and biases take those of one."""
  return ref.dtype.itemsize == 2 and not biased


class Functions(NamedTuple):
  """Of scores, as exact as the dtype that weights are rounded to."""

  exp2: Callable[[jax.Array], jax.Array]
  sigmoid: Sigmoid


def functions(dtype, interpret: bool) -> Functions:
  """Single instructions (PTX ISA, ex2.approx: 2^-22, tanh.approx: 2^-11), where libdevice has ten.

  The interpreter has no instructions.
  """
  exp2 = jnp.exp2 if interpret else _ex2
  exact = interpret or dtype == jnp.float32
  return Functions(exp2, jax.nn.sigmoid if exact else sigmoid_by(plgpu.approx_tanh))


def _ex2(x: jax.Array) -> jax.Array:
  (power,) = plgpu.elementwise_inline_asm(
    "ex2.approx.ftz.f32 $0, $1;",
    args=[x],
    constraints="=f,f",
    pack=1,
    result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
  )
  return power


def biased_score(form: Form, score, tables, head, x_qs, x_ks, unit: float):
  """(score with biases, in which 1 is `unit`; bucket of every pair and bias)."""
  found = []
  for buckets, table_ref, x_q, x_k in zip(form.biases, tables, x_qs, x_ks):
    bucket = buckets(x_q - x_k, table_ref.shape[1])
    score += plgpu.load(table_ref.at[head, bucket]).astype(jnp.float32) * unit
    found.append(bucket)
  return score, found


def ids(heads: int):
  # Heads lie beside each other in memory: neighbours in time share lines of the cache.
  program = pl.program_id(0)
  return program // heads, program % heads


def split(rest, biased: int):
  """(tables, query coordinates, key coordinates, outputs)."""
  return rest[:biased], rest[biased : 2 * biased], rest[2 * biased : 3 * biased], rest[3 * biased :]
