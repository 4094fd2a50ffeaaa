"""The best of a few plans: meshes first, then 8 bits and recomputation on the best of them.

A dozen compilations would take hours for what a few tell: steps on different meshes differ by their
communication, which 8-bit products and activations hardly change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from gemjax import config as config_lib
from gemjax.config import ConfigError
from gemjax.features import FeatureSet
from gemjax.plan.target import PlanError, Topology
from gemjax.plan.training import PlannedStep, plan_training
from gemjax.train.state import state_bytes

MESHES = 4


def search(
  config: config_lib.Config,
  features: FeatureSet,
  topology: Topology,
  say: Callable[[str], None],
) -> PlannedStep:
  """The fastest plan that fits, by its estimate; each is told in a line as soon as it is known.

  Tried are up to four meshes, then on the best one the MLPs' products in 8 bits and, while nothing
  fits, activations in 8 bits and all layers recomputed.

  Raises:
    PlanError: nothing fits.
    ConfigError: the config is wrong on every mesh.
  """
  limit = topology.target.memory_bytes
  fits = lambda step: step.budget.total <= limit
  order = lambda step: (not fits(step), step.estimate.seconds if fits(step) else step.budget.total)

  def tried(config, mesh) -> PlannedStep:
    step = plan_training(config, features, topology, mesh)
    held, seconds = step.budget.total / 1e9, step.estimate.seconds
    verdict = "fits" if fits(step) else "does not fit"
    say(
      f"mesh {mesh[0]}x{mesh[1]}{_said(config)}: {held:.2f} GB, {verdict}, {seconds * 1e3:.1f} ms"
    )
    return step

  steps, refusals = [], []
  for mesh in meshes(config, features, topology):
    try:
      steps.append(tried(config, mesh))
    except ConfigError as error:
      refusals.append(error)
  if not steps:
    raise refusals[-1]
  best = min(steps, key=order)
  mesh = tuple(best.trainer.mesh.shape.values())
  for changed in _changes(best.trainer.config):
    if changed.memory == best.trainer.config.memory or not fits(best):
      best = min(best, tried(changed, mesh), key=order)
  if not fits(best):
    raise PlanError(
      f"nothing fits: the least is {best.budget.total / 1e9:.2f} GB of {limit / 1e9:.2f} GB a "
      "device; take more GPUs or a smaller config.data.batch_size"
    )
  return best


def meshes(
  config: config_lib.Config, features: FeatureSet, topology: Topology
) -> list[tuple[int, int]]:
  """(data, model) with `model` a power of two: the few smallest whose share of the state fits."""
  size, held = topology.size, state_bytes(config, features)
  possible = [2**i for i in range(size.bit_length()) if size % 2**i == 0]
  enough = [m for m in possible if held / m < topology.target.memory_bytes]
  return [(size // m, m) for m in enough[:MESHES] or possible[-1:]]


def _changes(config: config_lib.Config) -> Iterator[config_lib.Config]:
  if not isinstance(config.model, config_lib.Wukong | config_lib.Gem):
    return
  train, memory = config.train, config.memory
  if not train.float8_mlp:
    yield dataclasses.replace(config, train=dataclasses.replace(train, float8_mlp=True))
  layers = config.model.layers + isinstance(config.model, config_lib.Gem)
  for activations, recomputed in (("float8", 0), ("computed", layers)):
    less = dataclasses.replace(memory, activations=activations, recomputed_layers=recomputed)
    yield dataclasses.replace(config, memory=less)


def _said(config: config_lib.Config) -> str:
  parts = []
  if config.train.float8_mlp:
    parts.append("products in 8 bits")
  if config.memory.activations == "float8":
    parts.append("activations in 8 bits")
  if config.memory.recomputed_layers:
    parts.append(f"{config.memory.recomputed_layers} layers recomputed")
  return "".join(f", {part}" for part in parts)
