"""Light variants: the shape of an experiment at a fraction of its cost."""

import dataclasses
from typing import Any

from gemjax.config.experiment import Config
from gemjax.config.sequences import Attention
from gemjax.fields import ConfigError

SHARE = 4


def sized(config: Config, variant: str) -> Config:
  """`config` itself where `variant` is "full", its light variant where it is "light".

  Raises:
    ConfigError: it is neither.
  """
  if variant not in ("full", "light"):
    raise ConfigError(f"variant {variant!r} is neither full nor light")
  return light(config) if variant == "light" else config


def light(config: Config) -> Config:
  """A quarter of every width, and all else as it was: layers, units, branches, events, batches.

  The width of a unit and of hidden layers is divided by four, and so is the number of attention
  heads where there are as many. Matrix products between widths cost a sixteenth, those from units
  to widths and tables a quarter. Meta runs over half of its experiments on such variants (GEM).
  """
  dim = config.embedding.dim // SHARE
  embedding = dataclasses.replace(
    config.embedding, dim=dim, dense_mlp=_narrow(config.embedding.dense_mlp)
  )
  return dataclasses.replace(
    config, name=f"{config.name}_light", embedding=embedding, model=_light(config.model)
  )


def _light(model: Any) -> Any:
  changes = {}
  for field in dataclasses.fields(model):
    value = getattr(model, field.name)
    if isinstance(value, Attention):
      changes[field.name] = dataclasses.replace(value, heads=max(1, value.heads // SHARE))
    elif value and field.name in ("mlp", "head", "hidden", "interest"):
      changes[field.name] = _narrow(value) if isinstance(value, tuple) else max(1, value // SHARE)
  return dataclasses.replace(model, **changes)


def _narrow(widths: tuple[int, ...]) -> tuple[int, ...]:
  return tuple(max(1, width // SHARE) for width in widths)
