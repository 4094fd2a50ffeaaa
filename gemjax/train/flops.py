"""Arithmetic of a traced function."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.interpreters import partial_eval


def matmul_flops(function: Callable, *args: Any) -> int:
  """2 M N K summed over every matrix product of `function(*args)`, loops times their trips.

  Of a function of `jax.jit` that was traced for such arguments before, that trace is counted.

  Counted on the traced program less what nothing reads, so that it is the same on every machine;
  element-wise work and look-ups are not counted, nor are loops that end where the data do and
  kernels: those of jagged ops, which cost.py counts. Arguments may be `jax.ShapeDtypeStruct`s.
  """
  jitted = function if hasattr(function, "trace") else jax.jit(function)
  jaxpr = jitted.trace(*args).jaxpr.jaxpr
  used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  return _count(used)


def _count(jaxpr) -> int:
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name in ("while", "pallas_call"):
      continue
    if eqn.primitive.name == "cond":  # Of platforms the default, a GPU's; else where it holds.
      total += _count(eqn.params["branches"][-1].jaxpr)
      continue
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      shape = eqn.invars[0].aval.shape
      total += 2 * eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    trips = eqn.params["length"] if eqn.primitive.name == "scan" else 1
    if eqn.primitive.name == "shard_map":  # The program of one of its devices.
      trips = eqn.params["mesh"].size
    for value in eqn.params.values():
      for inner in value if isinstance(value, tuple | list) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          total += trips * _count(inner)
  return total
