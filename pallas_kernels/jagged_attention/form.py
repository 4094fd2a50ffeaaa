"""What the implementations are handed: one static description and the arrays of one call."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.jagged_attention.activation import SOFTMAX
from pallas_kernels.jagged_attention.bias import Buckets, LinearBuckets, LogBuckets


@dataclasses.dataclass(frozen=True, slots=True)
class Form:
  """Static: the function of a score, s = scale * q.k + the sum of biases."""

  activation: str
  scale: float
  biases: tuple[Buckets | LinearBuckets | LogBuckets, ...] = ()

  @property
  def softmax(self) -> bool:
    return self.activation == SOFTMAX


class Plan(NamedTuple):
  """Arrays that say who sees whom; none has a gradient. Letters: T queries, E keys, S segments."""

  q_offsets_S1: jax.Array
  kv_offsets_S1: jax.Array
  lo_T: jax.Array  # Query t sees the keys [lo, hi).
  hi_T: jax.Array
  gain_T: jax.Array  # float32; what the activation of a score of query t is multiplied with.
  q_coordinates: tuple[jax.Array, ...]  # (T,) int32 for every bias.
  kv_coordinates: tuple[jax.Array, ...]  # (E,) int32.


class Saved(NamedTuple):
  """What the forward pass keeps for the backward pass, beside its arguments."""

  out_THD: jax.Array
  log_TH: jax.Array  # float32; log of the softmax's denominator; shape (0, 0) where there is none.


class Gradients(NamedTuple):
  """Of the four inputs that have one."""

  q_THD: jax.Array
  k_EHD: jax.Array
  v_EHD: jax.Array
  tables: tuple[jax.Array, ...]  # (H, N) float32 for every bias.


def wide(x: jax.Array) -> jnp.dtype:
  """The dtype in which sums over `x` are kept: float32, or float64 for float64."""
  return jnp.promote_types(x.dtype, jnp.float32)
