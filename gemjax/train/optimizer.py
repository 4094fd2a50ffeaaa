"""The dense optimiser and the learning-rate schedule that dense parameters and tables share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from gemjax import config as config_lib


def schedule(config: config_lib.Optimizer, steps: int) -> optax.Schedule:
  """Share of the base learning rate at 0-based step t, in (0, 1].

  (t + 1) / w for the first w = warmup * steps; then constant, or down to 0 at `steps`, by a line
  or by (1 + cos) / 2.
  """
  warm = round(config.warmup * steps)
  rest = max(1, steps - warm)
  decay = {
    "constant": optax.constant_schedule(1.0),
    "linear": optax.linear_schedule(1.0, 0.0, rest),
    "cosine": optax.cosine_decay_schedule(1.0, rest),
  }[config.schedule]

  def share(t):
    return jnp.where(t < warm, (t + 1) / max(1, warm), decay(t - warm))

  return share


def dense_optimizer(config: config_lib.Optimizer, steps: int) -> optax.GradientTransformation:
  """Adam, after L2 on kernels (not on biases and norms) and clipping by the global norm."""
  share = schedule(config, steps)
  parts = [
    optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
    optax.add_decayed_weights(config.l2, mask=kernels) if config.l2 else optax.identity(),
    optax.adam(lambda t: config.learning_rate * share(t)),
  ]
  return optax.chain(*parts)


def kernels(params) -> dict:
  """True for the weights that multiply activations, by the last name of their path."""
  names = ("kernel", "kernel_NL", "y_NK")
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in names, params)
