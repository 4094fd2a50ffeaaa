"""What the backward pass of a layer needs, kept small or computed again.

A layer is a function (weights, inputs...) -> outputs. Its pullback, as JAX makes it, is a pytree of
arrays: those that follow from the inputs are kept in 8 bits when the forward pass is done with them
(kept.py), and come back when the backward pass begins.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from gemjax.layers.kept import keep


class Keeping(NamedTuple):
  """How the layers of a model keep what their backward pass needs, and lie in its program."""

  float8: bool = False
  recomputed: int = 0  # Layers, from the first on, whose inputs alone are kept.
  unroll: int = 0  # Layers in one turn of a loop over layers; 0: as the model has it.
  early_sums: bool = False  # Where one turn has all, whether weights' gradients are awaited in it.


ALL = Keeping()  # As it is computed.


def run(
  keeping: Keeping,
  module: nnx.Module,
  *inputs: Any,
  layer: int | None = None,
  last: bool = False,
) -> Any:
  """`module(*inputs)`, which is layer number `layer` of a model, or none that may be recomputed.
  The `last` of a model is the first of its backward pass.
  """
  graph, weights = nnx.split(module)
  recompute = layer is not None and layer < keeping.recomputed
  called = lambda weights, *inputs: nnx.merge(graph, weights)(*inputs)
  if last:
    weights, inputs = _together(weights, inputs)
  return saved(called, float8=keeping.float8, recompute=recompute)(weights, *inputs)


def scan(
  keeping: Keeping,
  layer: Callable,
  carry: Any,
  stack: Any,
  *shared: Any,
  first: int = 0,
  unroll: int = 1,
) -> Any:
  """The carry behind all layers of a stack: those to be recomputed in one loop, the others in one.

  Args:
    keeping: Of the model.
    layer: (weights, carry, index, *shared) -> carry; pure, closes over no array.
    carry: What the first one reads.
    stack: Weights of all layers, of an axis more.
    shared: What every layer reads.
    first: The number of the stack's first layer in the model.
    unroll: As in `jax.lax.scan`, unless `keeping` says.
  """
  unroll = keeping.unroll or unroll
  count = len(jax.tree.leaves(stack)[0])
  border = min(max(keeping.recomputed - first, 0), count)
  carry = _loop(keeping, layer, carry, stack, shared, range(border), True, unroll)
  return _loop(keeping, layer, carry, stack, shared, range(border, count), False, unroll)


def _loop(keeping, layer, carry, stack, shared, part: range, recompute: bool, unroll: int):
  count = len(jax.tree.leaves(stack)[0])
  if not part:
    return carry
  rest = len(part) % unroll
  if rest and rest < len(part):
    # JAX would join what the rest keeps to what the loop does, a copy of all in the backward pass.
    carry = _loop(keeping, layer, carry, stack, shared, part[:-rest], recompute, unroll)
    part = part[-rest:]
  step = saved(layer, float8=keeping.float8, recompute=recompute)
  if len(part) < count:
    stack = jax.tree.map(lambda w: w[part.start : part.stop], stack)

  if keeping.early_sums and unroll >= len(part) > 1:
    return _side_by_side(step, carry, stack, shared, part)

  def turn(carry, at):
    weights, index = at
    if len(part) == 1:
      weights, carry = _together(weights, carry)
    else:
      weights = _summed(weights)
    return step(weights, carry, index, *shared), None

  return jax.lax.scan(turn, carry, (stack, jnp.arange(part.start, part.stop)), unroll=unroll)[0]


def _side_by_side(step: Callable, carry: Any, stack: Any, shared: tuple, part: range) -> Any:
  """The carry behind layers that are no loop. The gradients of a layer's weights are awaited where
  the backward pass is through the layer in front of it.
  """
  leaves, tree = jax.tree.flatten(stack)
  split = lambda w: [x[0] for x in jnp.split(w, len(part))]
  weights = [tree.unflatten(of_layer) for of_layer in zip(*map(split, leaves))]
  for i, index in enumerate(part):
    if i + 1 < len(part):
      weights[i + 1], carry = _together(weights[i + 1], carry)
    carry = step(_summed(weights[i]), carry, jnp.int32(index), *shared)
  return carry


@jax.custom_vjp
def _together(weights: Any, x: Any) -> tuple[Any, Any]:
  """Both as they are. Their gradients are awaited together: XLA's scheduler works from the end of
  the step and would leave the sums of all weights' gradients over the devices to it.
  """
  return weights, x


def _awaited(_, gradients):
  leaves, tree = jax.tree.flatten(gradients)
  floats = [g.dtype != jax.dtypes.float0 for g in leaves]  # Counts and ids have no gradient.
  awaited = iter(jax.lax.optimization_barrier([g for g, f in zip(leaves, floats) if f]))
  return jax.tree.unflatten(tree, [next(awaited) if f else g for g, f in zip(leaves, floats)])


_together.defvjp(lambda *both: (both, None), _awaited)


@jax.custom_vjp
def _summed(weights: Any) -> Any:
  """The weights. Their gradients are summed over the batch before the layers' are put together:
  within that copy XLA for GPUs would sum them one thread a number, five times as slow.
  """
  return weights


_summed.defvjp(lambda weights: (weights, None), lambda _, gradient: _awaited(_, (gradient,)))


def saved(layer: Callable, *, float8: bool, recompute: bool) -> Callable:
  """`layer(weights, *inputs)` with the same outputs, whose backward pass needs less memory.

  Args:
    layer: Pure; closes over no array.
    float8: What is saved of floats is rounded to float8_e4m3fn with a scale for each row of the
      last axis, masks become bits: about half of bfloat16, a quarter of float32. Weights,
      statistics (an axis of size 1) and rows of less than 32 numbers stay as they are. Saved
      numbers are then wrong by up to 1/16. What is `made_again` (kept.py) is not saved: so that
      Wukong and GEM hold less than half of what they do in bfloat16.
    recompute: Only the inputs are saved, as they are, and the layer is computed again when its
      gradient is due.

  Source: activations in 8 bits as in COAT (Xi et al. 2024, arXiv 2410.19313); recomputation as in
  Chen et al. 2016, arXiv 1604.06174.
  """
  if not (float8 or recompute):
    return layer

  @jax.custom_vjp
  def wrapped(weights, *inputs):
    return layer(weights, *inputs)

  def forward(weights, *inputs):
    if recompute:
      return layer(weights, *inputs), (weights, inputs)
    return keep(*_traced(layer, weights, inputs), jax.tree.leaves((weights, inputs)))

  def backward(kept, gradients):
    if recompute:
      # Behind the barrier this is another computation than the forward one, whose results go.
      weights, inputs = jax.lax.optimization_barrier(kept)
      _, pullback = jax.vjp(layer, weights, *inputs)
    else:
      pullback = kept.pullback(gradients)
    return pullback(gradients)

  wrapped.defvjp(forward, backward)
  return wrapped


def bytes_saved(function: Callable, weights: Any, *inputs: Any) -> int:
  """Bytes of the arrays that `function(weights, *inputs)` makes from its inputs and keeps for its
  backward pass; nothing is computed.
  """
  program, (_, leaves), _, of_inputs = _traced(function, weights, inputs)
  places = program.jaxpr.outvars[-len(leaves) :] if leaves else []
  kept = {v for v in places if id(v) in of_inputs} - set(program.jaxpr.invars)
  return sum(v.aval.size * v.aval.dtype.itemsize for v in kept)


def _traced(function: Callable, weights: Any, inputs: tuple):
  """The function with its pullback, traced once, for models are slow to trace.

  Returns (program, shapes of its outputs and of the pullback's arrays, the pullback's structure,
  ids of the variables that follow from the inputs).
  """
  trees = []

  def with_pullback(*args):
    outputs, pullback = jax.vjp(function, *args)
    leaves, tree = jax.tree.flatten(pullback)
    trees.append(tree)
    return outputs, leaves

  program, shapes = jax.make_jaxpr(with_pullback, return_shape=True)(weights, *inputs)
  of_inputs = {id(v) for v in program.jaxpr.invars[len(jax.tree.leaves(weights)) :]}
  for eqn in program.jaxpr.eqns:
    if any(id(v) in of_inputs for v in eqn.invars):
      of_inputs.update(map(id, eqn.outvars))
  return program, shapes, trees[-1], of_inputs
