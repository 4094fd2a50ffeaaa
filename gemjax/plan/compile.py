"""One program, compiled for devices that are not here.

args = (jax.ShapeDtypeStruct((rows, width), "float32", sharding=NamedSharding(mesh, spec)), ...)
done = compile_for(step, args, donate=0)
assert {c.axes for c in done.collectives if c.kind == "all-to-all"} == {("model",)}
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from gemjax.plan.collectives import Collective, collectives
from gemjax.plan.memory import Memory, memory
from gemjax.plan.target import PlanError


class Compiled:
  """A compiled program's scheduled text, memory and collectives, each read once."""

  def __init__(self, executable: jax.stages.Compiled, mesh: jax.sharding.AbstractMesh):
    self.executable = executable
    self.mesh_shape = dict(mesh.shape)

  @functools.cached_property
  def text(self) -> str:
    return self.executable.as_text()

  @functools.cached_property
  def memory(self) -> Memory:
    return memory(self.executable)

  @functools.cached_property
  def collectives(self) -> list[Collective]:
    return collectives(self.text, self.mesh_shape)


def compile_for(
  fn: Callable[..., Any], args: Sequence[Any], *, donate: int | Sequence[int] = ()
) -> Compiled:
  """Compiles `fn(*args)` for the GPUs in the shardings of `args`.

  `args` are pytrees of ShapeDtypeStruct whose sharding is a NamedSharding on a mesh made of
  `target.devices(topology)`. `fn` may be jitted already, and then has its own donation.
  Raises PlanError if no argument has such a sharding or if they lie on different meshes.
  """
  meshes = {
    leaf.sharding.mesh
    for leaf in jax.tree.leaves(args)
    if isinstance(getattr(leaf, "sharding", None), jax.sharding.NamedSharding)
  }
  if len(meshes) != 1:
    raise PlanError(
      "the arguments must be ShapeDtypeStruct with a NamedSharding on one mesh, "
      f"but lie on {len(meshes)} meshes"
    )
  jitted = hasattr(fn, "trace")
  if jitted and donate != ():
    raise PlanError(f"donate={donate} has no effect on a jitted function: give it to jax.jit")
  program = fn if jitted else jax.jit(fn, donate_argnums=donate)
  lowered = program.trace(*args).lower(lowering_platforms=("cuda",))
  return Compiled(lowered.compile(), meshes.pop())
