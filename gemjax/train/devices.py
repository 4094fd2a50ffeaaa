"""Which devices a run uses: the mesh by rule or by config, said in words."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh

from gemjax import config as config_lib
from gemjax.config import DATA, MODEL
from gemjax.features import FeatureSet
from gemjax.parallel.mesh import choose_mesh, device_memory, make_mesh
from gemjax.train.state import make_trainer


def open_mesh(config: config_lib.Config, features: FeatureSet) -> tuple[Mesh, list[str]]:
  """(mesh, lines that say why it is as it is, and why the tables lie where they lie).

  Raises:
    ConfigError: `config.mesh` is not of the devices there are.
  """
  alone = make_trainer(config, features, steps=1, mesh=make_mesh(1, 1, jax.local_devices()[:1]))
  state = jax.eval_shape(alone.born)
  found = jax.device_count()
  data, model, reason = choose_mesh(config.mesh, found, state_bytes(state), device_memory())
  mesh = make_mesh(data, model)
  used = f"{data * model} of {found} devices" if data * model < found else f"{found} devices"
  lines = [f"mesh: {DATA} {data} x {MODEL} {model}, {used}: {reason}"]
  if mesh.size > 1:
    lines += [f"tables: {'; '.join(alone.tables.layout.reasons)}"]
  return mesh, lines


def state_bytes(state: Any) -> int:
  """Bytes of a tree of arrays or shapes."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
