"""Where arrays lie on the data x model mesh: models name logical axes, this file places them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from gemjax.config import DATA, MODEL

Specs = dict[str, Any]  # Tree of PartitionSpec.

# Below it, gathering a kernel for every use costs more than keeping it: 2^14 float32 and their two
# Adam moments are 192 KiB a device.
SMALLEST_SHARDED = 2**14


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Axes:
  """Logical axis -> mesh axis, or None: every device holds all of it."""

  batch: tuple[str, ...] = (DATA, MODEL)  # Device m of group g holds part g * M + m.
  rows: str = MODEL  # Of the embedding tables, which outgrow a GPU.
  # Kernels are sharded over the axis that the product sums over, so that what is gathered is
  # contiguous: the parts lie one behind the other.
  fan_in: str = MODEL
  fan_out: None = None
  width: None = None  # Norms and their like, too small to matter.
  layer: None = None  # A scan reads whole layers, one after the other.


AXES = Axes()


def spec(*names: str) -> PartitionSpec:
  """The placement of an array by the logical names of its first axes: spec("batch")."""
  return PartitionSpec(*(getattr(AXES, name) for name in names))


def param_specs(params: nnx.State, mesh_shape: Mapping[str, int]) -> Specs:
  """Placement of every dense parameter, in the structure of `nnx.to_pure_dict(params)`.

  A kernel is sharded if its fan-in divides by the mesh's `model` axis and a layer of it has at
  least SMALLEST_SHARDED elements; all else is replicated. No padding: the shards of a kernel put
  one behind the other are the kernel, and a checkpoint fits every mesh.

  Args:
    params: Arrays or their shapes, each an nnx.Param with `axes`, the names of its axes.
    mesh_shape: Mesh axis -> devices, as `mesh.shape`.

  Raises:
    ValueError: a parameter does not name its axes.
  """
  return nnx.to_pure_dict(params, extract_fn=lambda param: _param_spec(param, mesh_shape))


def _param_spec(param: nnx.Param, mesh_shape: Mapping[str, int]) -> PartitionSpec:
  shape, names = param.shape, param.get_metadata().get("axes", ())
  if len(names) != len(shape):
    raise ValueError(
      f"a parameter of shape {shape} names the axes {names}, but needs one name for each of its "
      "axes: nnx.Param(..., axes=(...))"
    )
  layer = math.prod(n for n, name in zip(shape, names) if name != "layer")

  def place(n: int, name: str) -> str | None:
    axis = getattr(AXES, name)
    if axis is None or layer < SMALLEST_SHARDED or n % mesh_shape[axis]:
      return None
    return axis

  return PartitionSpec(*(place(n, name) for n, name in zip(shape, names)))


def state_specs(optimizer: optax.GradientTransformation, params: Any, specs: Specs) -> Any:
  """Placement of `optimizer.init(params)`: moments lie where their parameters do.

  Counts and other scalars are replicated.

  Args:
    optimizer: Of the dense parameters.
    params: Pure dict of arrays or of their shapes.
    specs: Of the same structure, from `param_specs`.
  """
  return optax.tree_map_params(
    optimizer,
    lambda _, spec: spec,
    jax.eval_shape(optimizer.init, params),
    specs,
    transform_non_params=lambda _: PartitionSpec(),
  )


def sharded(spec: PartitionSpec) -> bool:
  """Whether each device of a group holds a part only."""
  return MODEL in spec


def reduce_gradients(grads: Any, specs: Any) -> Any:
  """Sums over devices inside `jax.shard_map`; a mesh axis of one device asks for nothing.

  A replicated parameter's gradient is summed over both axes. That of a sharded one came out of the
  transposed gather (a reduce-scatter) as a sum over `model`, and is summed over `data`.

  Args:
    grads: Each device's gradients of its examples' share of the loss.
    specs: Of the same structure.
  """

  def reduce(grad: jax.Array, spec: PartitionSpec) -> jax.Array:
    axes = (DATA,) if sharded(spec) else (DATA, MODEL)
    axes = tuple(axis for axis in axes if jax.lax.axis_size(axis) > 1)
    return jax.lax.psum(grad, axes) if axes else grad

  return jax.tree.map(reduce, grads, specs)
