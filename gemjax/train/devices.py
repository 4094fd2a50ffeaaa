"""Which devices a run uses: the mesh by rule or by config, said in words."""

from __future__ import annotations

import jax
from jax.sharding import Mesh

from gemjax import config as config_lib
from gemjax.config import DATA, MODEL
from gemjax.embedding import layout_tables
from gemjax.embedding.tables import check_mesh
from gemjax.features import FeatureSet
from gemjax.parallel.mesh import choose_mesh, device_memory, make_mesh
from gemjax.train.activations import fit_budget
from gemjax.train.state import state_bytes


def open_mesh(config: config_lib.Config, features: FeatureSet) -> tuple[Mesh, list[str]]:
  """(mesh of this run's devices, lines that say why it is as it is); raises as `shape_mesh`."""
  data, model, lines = shape_mesh(config, features, jax.device_count(), device_memory())
  return make_mesh(data, model), lines


def open_training(
  config: config_lib.Config, features: FeatureSet
) -> tuple[Mesh, config_lib.Config, list[str]]:
  """(mesh, the config within its activation budget on it, lines that say why).

  Raises as `shape_mesh` and `fit_budget`.
  """
  mesh, lines = open_mesh(config, features)
  config = fit_budget(config, features, mesh)
  if config.memory.recomputed_layers:
    lines.append(f"activations: layers computed again: {config.memory.recomputed_layers}")
  return mesh, config, lines


def shape_mesh(
  config: config_lib.Config, features: FeatureSet, devices: int, device_bytes: int | None
) -> tuple[int, int, list[str]]:
  """(data, model, lines): the mesh, and why it and the tables are as they are.

  Raises:
    ConfigError: `config.mesh` is not of the devices there are, or the tables cannot be split so.
  """
  layout = layout_tables(features, config.embedding)
  possible = [m for m in range(1, devices + 1) if devices % m == 0 and _splits(layout, m)]
  if not possible:
    check_mesh(layout, devices)
  size = state_bytes(config, features)
  data, model, reason = choose_mesh(config.mesh, devices, possible, size, device_bytes)
  check_mesh(layout, model)
  used = f"{data * model} of {devices} devices" if data * model < devices else f"{devices} devices"
  lines = [f"mesh: {DATA} {data} x {MODEL} {model}, {used}: {reason}"]
  if data * model > 1:
    lines += [f"tables: {'; '.join(layout.reasons)}"]
  return data, model, lines


def part_of_process(mesh: Mesh) -> dict[str, int]:
  """Which part of every batch is this process', as the pipeline wants to know it."""
  return {
    "process_index": jax.process_index(),
    "process_count": jax.process_count(),
    "shards": mesh.size,
  }


def _splits(layout, model: int) -> bool:
  try:
    check_mesh(layout, model)
  except config_lib.ConfigError:
    return False
  return True
