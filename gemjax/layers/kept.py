"""Kept: what the backward pass of a layer needs of its forward pass, in 8 bits or made again.

Of the arrays that a pullback holds, those that follow from the layer's inputs are rounded to 8
bits, masks to bits. No layer has to know of it; one that says what is `made_again` keeps less.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp

from pallas_kernels import dequantize_fp8, quantize_fp8
from pallas_kernels.once import computed_once

# Rows of fewer numbers are kept as they are: a scale each would cost more than it saves.
NARROW = 32
# Calls in a traced program, by names that no other has.
_MADE_AGAIN, _CENTRED = "gemjax_made_again", "gemjax_made_again_centred"


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Packed:
  values: jax.Array  # float8, or words of mask bits.
  exponents: jax.Array | None  # uint8, of the rows' scales, 2^(e - 127); None for masks.
  width: int = dataclasses.field(metadata={"static": True})  # Of a row.
  dtype: Any = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Kept:
  """The arrays of a pullback: each is one of `arrays`, or made of some."""

  arrays: list[jax.Array | _Packed]
  # Of each: the number of an array, or a function and the recipes of its arguments.
  recipes: tuple = dataclasses.field(metadata={"static": True})
  tree: Any = dataclasses.field(metadata={"static": True})

  def pullback(self, gradients: Any) -> Callable:
    """With its arrays, which come back when the gradients of the layer's outputs are there."""
    floats = [g for g in jax.tree.leaves(gradients) if g.dtype != jax.dtypes.float0]
    there = [g.ravel()[:1] for g in floats]
    arrays = [_unpack(x, there) for x in self.arrays]

    def made(recipe):
      if isinstance(recipe, int):
        return arrays[recipe]
      function, of = recipe
      return function(*map(made, of))

    return jax.tree.unflatten(self.tree, map(made, self.recipes))


def made_again(function: Callable, *, centred: bool = False) -> Callable:
  """`function` of arrays, whose one result is not kept where 8 bits are, but made again of the
  arguments when the backward pass is there: what costs little, as a norm's output.

  With `centred` the difference of the first two arguments is kept, and the second, its mean: what
  counts of x may be small beside that.
  """
  called = lambda *args: function(*args)
  called.__name__ = _CENTRED if centred else _MADE_AGAIN
  return jax.jit(called)


def keep(
  program: jax.extend.core.ClosedJaxpr, shapes: tuple, tree: Any, of_inputs: set, args: list
) -> tuple[Any, Kept]:
  """(outputs, what the pullback is made of): an array that several products need is kept once.

  Args:
    program: args -> the leaves of (outputs, arrays of the pullback).
    shapes: Of those two.
    tree: Of the pullback.
    of_inputs: Ids of variables that follow from the layer's inputs; others are kept as they are.
    args: Of the program.
  """
  jaxpr, count = program.jaxpr, len(jax.tree.leaves(shapes[0]))
  of_name = lambda *names: [eqn for eqn in jaxpr.eqns if eqn.params.get("name") in names]
  again = {id(eqn.outvars[0]): eqn for eqn in of_name(_MADE_AGAIN, _CENTRED)}
  around = [eqn.invars[:2] for eqn in of_name(_CENTRED)]
  mean_of = {id(x): mean for x, mean in around if _wide(x.aval) and id(mean) not in again}
  kept = {}  # Id -> variable, in the order of the arrays.

  def number(v) -> int:
    kept.setdefault(id(v), v)
    return list(kept).index(id(v))

  def recipe(v):
    if id(v) in again:
      eqn = again[id(v)]
      return functools.partial(_call, eqn.params["jaxpr"]), tuple(map(recipe, eqn.invars))
    if id(v) in mean_of:
      return functools.partial(_add, v.aval.dtype), (number(v), recipe(mean_of[id(v)]))
    return number(v)

  recipes = tuple(map(recipe, jaxpr.outvars[count:]))
  outvars = [*jaxpr.outvars[:count], *kept.values()]
  made = jax.extend.core.jaxpr_as_fun(program.replace(jaxpr=jaxpr.replace(outvars=outvars)))(*args)
  values = dict(zip(kept, made[count:]))
  for v, mean in mean_of.items():
    if v in kept:
      values[v] = (values[v] - values[id(mean)]).astype(values[v].dtype)
  arrays = [_pack(x) if v in of_inputs else x for v, x in values.items()]
  # Else XLA's scheduler, which works from the end of the step, leaves the packing of all layers to
  # the end of the forward pass, and the wide arrays until then.
  packed = [x for x in arrays if isinstance(x, _Packed)]
  outputs, packed = jax.lax.optimization_barrier((made[:count], packed))
  packed = iter(packed)
  arrays = [next(packed) if isinstance(x, _Packed) else x for x in arrays]
  outputs = jax.tree.unflatten(jax.tree.structure(shapes[0]), outputs)
  return outputs, Kept(arrays, recipes, tree)


def _call(program, *args):
  return jax.extend.core.jaxpr_as_fun(program)(*args)[0]


def _add(dtype, offset, mean):
  return (offset + mean).astype(dtype)


def _wide(x: Any) -> bool:
  return x.ndim >= 2 and x.shape[-1] >= NARROW and 1 not in x.shape


def _pack(x: jax.Array) -> jax.Array | _Packed:
  if not _wide(x):
    return x
  if x.dtype == jnp.bool_:
    return _Packed(jnp.packbits(x, axis=-1), None, x.shape[-1], x.dtype)
  if x.dtype not in (jnp.float32, jnp.bfloat16):
    return x
  values, scales = quantize_fp8(x, granularity="row")
  # Powers of two: the exponent of the float says all.
  bits = jax.lax.bitcast_convert_type(scales, jnp.uint32)
  return _Packed(values, (bits >> 23).astype(jnp.uint8), x.shape[-1], x.dtype)


def _unpack(x: jax.Array | _Packed, there: list[jax.Array]) -> jax.Array:
  """Waits for all of `there`: XLA would make the wide array in the forward pass and keep that."""
  if not isinstance(x, _Packed):
    return x

  def unpacked(values, exponents, there):
    values, _ = jax.lax.optimization_barrier((values, there))
    if exponents is None:
      return jnp.unpackbits(values, axis=-1, count=x.width).astype(x.dtype)
    bits = exponents.astype(jnp.uint32) << 23
    scales = jax.lax.bitcast_convert_type(bits, jnp.float32)
    return dequantize_fp8(values, scales, dtype=x.dtype)

  # XLA for CPUs takes the barrier out again, but such a call waits for all its arguments.
  return computed_once(unpacked)(x.values, x.exponents, there)
