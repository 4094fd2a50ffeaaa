"""Interactions of units: factorisation machines and linear compression (Wukong, section 3).

Units lie last, so that every map over units is one plain matrix product without a transpose.
Letters: B examples, D width of a unit, N units in, K rank, L units out.
"""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from gemjax.layers.dropout import Key, fold
from gemjax.layers.linear import KERNEL, contract, kernel_init, side_by_side
from gemjax.layers.mlp import Mlp
from gemjax.layers.norm import written_once
from pallas_kernels.once import computed_once

GROUPS = 16  # Of examples, in which gradients of a map over units are summed.
TERMS = 16  # Most that a sum may have instead of a product of matrices,
LARGE = 2**23  # and the least entries of it: what caches hold is multiplied as fast.


class UnitLinear(nnx.Module):
  """X -> W X, W in R^{L x N}: Linear Compress Block, linear residual, summaries of units; (B, D, N)
  -> (B, D, L).

  With a bias every output unit has one number more, the same in all of its D places; born at 0.
  """

  def __init__(self, units: int, outputs: int, *, dtype: str, rngs: nnx.Rngs, bias: bool = False):
    self.kernel_NL = nnx.Param(kernel_init(rngs.params(), (units, outputs)), axes=KERNEL)
    self.bias_L = nnx.Param(jnp.zeros((outputs,)), axes=("fan_out",)) if bias else None
    self.units, self.dtype = units, dtype

  @jax.named_scope("unit_linear")
  def __call__(self, x_BDN: jax.Array) -> jax.Array:
    (y_BDL,) = map_units(x_BDN, (self.kernel_NL[...],), self.units, self.dtype)
    return y_BDL if self.bias_L is None else y_BDL + self.bias_L[...].astype(self.dtype)


class FactorizationMachine(nnx.Module):
  """Pairwise dot products of units, flattened (n k), on CPUs (k n): what reads them takes its
  weights by `on_cpu_inner_first`.

  basic      X Xᵀ                                         (B, D, N) -> (B, N * N)
  optimised  X (Xᵀ Y), Y in R^{N x K} learnt              (B, D, N) -> (B, N * K), O(N K D)
  attentive  as optimised, Y = reshape(MLP(flatten(C X))) of each example, C in R^{A x N}

  The map of units that it begins with, Xᵀ Y or C X, is the caller's to compute, beside others that
  read X (`map_together`): its kernel is `mapped_by`, None where there is none.

  Source: Wukong, section 3.4. The sizes inside the attentive MLP are unpublished; ours are A = K
  compressed units and one hidden layer of 4 K.
  """

  def __init__(self, kind: str, units: int, dim: int, rank: int, *, dtype: str, rngs: nnx.Rngs):
    self.kind, self.units, self.rank, self.dtype = kind, units, rank, dtype
    self.outputs = units * (units if kind == "basic" else rank)
    if kind == "optimised":
      self.y_NK = nnx.Param(kernel_init(rngs.params(), (units, rank)), axes=KERNEL)
    elif kind == "attentive":
      self.compress = UnitLinear(units, rank, dtype=dtype, rngs=rngs)
      self.mlp = Mlp(rank * dim, (4 * rank,), units * rank, dtype=dtype, rngs=rngs)

  @property
  def mapped_by(self) -> nnx.Param | None:
    """The kernel (N, K) of the map that comes first."""
    if self.kind == "attentive":
      return self.compress.kernel_NL
    return self.y_NK if self.kind == "optimised" else None

  @jax.named_scope("fm")
  def __call__(
    self, x_BDN: jax.Array, mapped_BDK: jax.Array | None, key_B: Key = None
  ) -> jax.Array:
    mixed_BDK = x_BDN if self.kind == "basic" else mapped_BDK
    if self.kind == "attentive":
      y = self.mlp(rearrange(mapped_BDK, "b d a -> b (a d)"), fold(key_B, 0))
      y_BNK = rearrange(y, "b (n k) -> b n k", n=self.units)
      mixed_BDK = jnp.einsum("bdn,bnk->bdk", x_BDN, y_BNK)
    return _pairs(x_BDN, mixed_BDK)


# On a CPU the small operand is turned and the pairs come out (k n), which weights then are, too
# (`on_cpu_inner_first`): XLA multiplies three times as fast what is summed over the first operand's
# last axis. Backward nothing needs to be turned. On GPUs all orders cost alike.
@jax.custom_vjp
def _pairs(x_BDN, mixed_BDK):
  """(B, I): X (Xᵀ Y), flattened (k n) on CPUs and (n k) elsewhere."""

  def on_cpu(x_BDN, mixed_BDK):
    mixed_BKD = written_once(rearrange(mixed_BDK, "b d k -> b k d"))
    return rearrange(jnp.einsum("bkd,bdn->bkn", mixed_BKD, x_BDN), "b k n -> b (k n)")

  def elsewhere(x_BDN, mixed_BDK):
    return rearrange(jnp.einsum("bdn,bdk->bnk", x_BDN, mixed_BDK), "b n k -> b (n k)")

  return jax.lax.platform_dependent(x_BDN, mixed_BDK, cpu=on_cpu, default=elsewhere)


def _pairs_forward(x_BDN, mixed_BDK):
  return _pairs(x_BDN, mixed_BDK), (x_BDN, mixed_BDK)


def _pairs_backward(kept, gradient_BI):
  units = kept[0].shape[2]

  def of(x_BDN, mixed_BDK, gradient_BI, lie, letters, product):
    gradient = rearrange(gradient_BI, lie, n=units)
    of_x_BDN = product(f"bdk,{letters}->bdn", mixed_BDK, gradient)
    of_mixed_BDK = jnp.einsum(f"bdn,{letters}->bdk", x_BDN, gradient)
    return of_x_BDN.astype(x_BDN.dtype), of_mixed_BDK.astype(mixed_BDK.dtype)

  # Of few terms that XLA joins to what is added to them, instead of writing it first.
  few = kept[1].shape[2] <= TERMS and kept[0].size >= LARGE and _exact(kept[0])
  on_cpu = functools.partial(
    of, lie="b (k n) -> b k n", letters="bkn", product=_term_by_term if few else jnp.einsum
  )
  elsewhere = functools.partial(of, lie="b (n k) -> b n k", letters="bnk", product=jnp.einsum)
  return jax.lax.platform_dependent(*kept, gradient_BI, cpu=on_cpu, default=elsewhere)


def _exact(x: jax.Array) -> bool:
  """Whether sums of x need no rounding after every term, which takes time and digits."""
  return x.dtype.itemsize >= 4


def _term_by_term(_, mixed_BDK: jax.Array, gradient_BKN: jax.Array) -> jax.Array:
  """(B, D, N): their product, a sum of K terms."""
  return sum(mixed_BDK[:, :, k, None] * gradient_BKN[:, None, k] for k in range(mixed_BDK.shape[2]))


_pairs.defvjp(_pairs_forward, _pairs_backward)


@jax.custom_vjp
def units_turned(x_BND: jax.Array) -> jax.Array:
  """(B, D, N); its gradient (B, N, D) is written once for all that read it."""
  return written_once(rearrange(x_BND, "b n d -> b d n"))


def _units_turned_back(_, gradient_BDN):
  def turned_back(gradient_BDN):
    return written_once(rearrange(gradient_BDN, "b d n -> b n d"))

  return (computed_once(turned_back)(gradient_BDN),)


units_turned.defvjp(lambda x_BND: (units_turned(x_BND), None), _units_turned_back)


def units_flat(x_BDN: jax.Array) -> jax.Array:
  """(B, I), flattened (n d), on CPUs as they lie, (d n): for a map with `outer` N."""
  turned, as_they_lie = (
    lambda x, to=to: rearrange(x, f"b d n -> b ({to})") for to in ("n d", "d n")
  )
  return jax.lax.platform_dependent(x_BDN, cpu=as_they_lie, default=turned)


def units_last(x_BI: jax.Array, dim: int) -> jax.Array:
  """(B, D, N) of units that lie flat, (n d), on CPUs (d n): of a map with `columns` N."""
  turned, as_they_lie = (
    lambda x, of=of: rearrange(x, f"b ({of}) -> b d n", d=dim) for of in ("n d", "d n")
  )
  return jax.lax.platform_dependent(x_BI, cpu=as_they_lie, default=turned)


def map_units(
  x_BDN: jax.Array, kernels: tuple[jax.Array, ...], units: int, dtype: str
) -> tuple[jax.Array, ...]:
  """Every example's X W, (B, D, L), of all `kernels`, which lie whole or are this device's rows
  (`contract`).
  """
  if kernels[0].shape[0] != units:
    return _columns(contract("bdn,nl->bdl", x_BDN, kernels, units, dtype), kernels)
  return _map_whole(x_BDN.astype(dtype), kernels)


@jax.named_scope("unit_linear")
def map_together(
  x_BDN: jax.Array, kernels: list[nnx.Param | jax.Array | None], units: int, dtype: str
) -> list[jax.Array | None]:
  """X W for every W, None for None, in one product for all that lie whole and one for all shards.

  X is read once for all of them, and its gradient is written once instead of summed.
  """
  found: list[jax.Array | None] = [None] * len(kernels)
  present = {i: kernel[...] for i, kernel in enumerate(kernels) if kernel is not None}
  for rows in sorted({kernel.shape[0] for kernel in present.values()}):
    alike = {i: kernel for i, kernel in present.items() if kernel.shape[0] == rows}
    for i, y_BDL in zip(alike, map_units(x_BDN, tuple(alike.values()), units, dtype)):
      found[i] = y_BDL
  return found


# W's gradient is a small matrix, a sum over B D: in groups side by side XLA neither writes X
# transposed nor leaves cores idle.
@jax.custom_vjp
def _map_whole(x_BDN, kernels):
  return _columns(jnp.einsum("bdn,nl->bdl", x_BDN, side_by_side(kernels, x_BDN.dtype)), kernels)


def _forward(x_BDN, kernels):
  return _map_whole(x_BDN, kernels), (x_BDN, kernels)


def _backward(kept, gradients_BDL):
  x_BDN, kernels = kept
  gradient_BDL = written_once(_joined(gradients_BDL))
  kernel_NL = side_by_side(kernels, x_BDN.dtype)
  of_x_BDN = jnp.einsum("bdl,nl->bdn", gradient_BDL, kernel_NL)
  groups = math.gcd(len(x_BDN), GROUPS)
  x_GRN, gradient_GRL = (
    rearrange(a, "(g b) d n -> g (b d) n", g=groups) for a in (x_BDN, gradient_BDL)
  )
  of_kernel_GNL = jnp.einsum(
    "grn,grl->gnl", x_GRN, gradient_GRL, preferred_element_type=kernels[0].dtype
  )
  return of_x_BDN, _columns(of_kernel_GNL.sum(0), kernels)


_map_whole.defvjp(_forward, _backward)


def _columns(y: jax.Array, kernels: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
  """The part of y's last axis that is of each kernel."""
  ends = list(itertools.accumulate(kernel.shape[1] for kernel in kernels))
  return tuple(jnp.split(y, ends[:-1], -1))


def _joined(parts: tuple[jax.Array, ...]) -> jax.Array:
  """Side by side, of float32 on CPUs a sum of padded parts: XLA joins it to what reads it at twice
  the speed.
  """

  def padded(*parts):
    widths = [part.shape[-1] for part in parts]
    ends = itertools.accumulate(widths)
    room = [(end - width, sum(widths) - end) for end, width in zip(ends, widths)]
    around = [(0, 0)] * (parts[0].ndim - 1)
    return sum(jnp.pad(part, [*around, r]) for part, r in zip(parts, room))

  beside = lambda *parts: jnp.concatenate(parts, -1)
  on_cpu = padded if _exact(parts[0]) else beside
  return jax.lax.platform_dependent(*parts, cpu=on_cpu, default=beside)


@jax.custom_vjp
def units_joined(first_BDN: jax.Array, second_BDN: jax.Array) -> jax.Array:
  """(B, D, N + M): units side by side."""
  return _joined((first_BDN, second_BDN))


def _joined_forward(first_BDN, second_BDN):
  return _joined((first_BDN, second_BDN)), first_BDN.shape[2]


def _joined_backward(first, gradient_BDN):
  first_units = lambda gradient_BDN: gradient_BDN[:, :, :first]
  return computed_once(first_units)(gradient_BDN), gradient_BDN[:, :, first:]


units_joined.defvjp(_joined_forward, _joined_backward)


def pairwise_dots(x_BND: jax.Array) -> jax.Array:
  """(B, N (N - 1) / 2): the dot product of every pair of different units (DLRM)."""
  first, second = jnp.triu_indices(x_BND.shape[1], k=1)
  return jnp.einsum("bnd,bmd->bnm", x_BND, x_BND)[:, first, second]
