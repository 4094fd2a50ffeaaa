"""One program, compiled for devices that are not here.

args = (jax.ShapeDtypeStruct((rows, width), "float32", sharding=NamedSharding(mesh, spec)), ...)
done = compile_for(step, args, donate=0)
assert {c.axes for c in done.collectives if c.kind == "all-to-all"} == {("model",)}
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from gemjax.plan.collectives import Collective, collectives
from gemjax.plan.memory import Memory, memory
from gemjax.plan.target import PlanError

# Of XLA; in XLA_FLAGS, with two dashes before it, it does the same to the step of a run.
PROFILE_FLAG = "xla_gpu_pgle_profile_file_or_directory_path"


class Compiled:
  """A compiled program's scheduled text, memory and collectives, each read once."""

  def __init__(
    self,
    lowered: jax.stages.Lowered,
    mesh: jax.sharding.AbstractMesh,
    options: dict[str, str] | None = None,
  ):
    self._lowered, self._mesh = lowered, mesh
    self.executable = lowered.compile(options)
    self.mesh_shape = dict(mesh.shape)

  def scheduled_by(self, profile: str | Path) -> Compiled:
    """The program compiled again, its collectives and kernels ordered by the costs in the file
    `profile` (see Estimate.profile) instead of those that XLA assumes.
    """
    return Compiled(self._lowered, self._mesh, {PROFILE_FLAG: str(profile)})

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
  return Compiled(lowered, meshes.pop())
