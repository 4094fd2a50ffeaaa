"""The parts of the training objective."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gemjax.config import DATA, MODEL
from gemjax.features import UNLABELLED
from gemjax.layers.next_event import NextEvents, next_event_loss, others


def binary_cross_entropy(
  logits_BT: jax.Array,
  label_BT: jax.Array,
  weight_B: jax.Array,
  task_weight_T: jax.Array,
  total_weight: jax.Array,
) -> jax.Array:
  """sum_t c_t sum_b w_b (softplus(x_bt) - y_bt x_bt) / total_weight, in nats; a scalar.

  The sum over b goes over the examples that have a label of task t. `total_weight` is sum_b w_b of
  all examples of the batch of which these may be a part: parts add up, and a task weighs as much as
  it has labels.
  """
  loss_BT = jax.nn.softplus(logits_BT) - label_BT * logits_BT
  loss_BT = jnp.where(label_BT == UNLABELLED, 0, loss_BT)
  sum_T = jnp.einsum("bt,b->t", loss_BT, weight_B)
  return sum_T @ task_weight_T / jnp.maximum(total_weight, 1)


def next_events(following: tuple[NextEvents, ...]) -> jax.Array:
  """The sum over histories of this device's part of `next_event_loss`, inside `jax.shard_map`."""
  total = jnp.zeros(())
  for of in following:
    count = jax.lax.psum(of.followed_E.sum(), (DATA, MODEL))
    total += next_event_loss(of, *others(of, (DATA, MODEL)), count)
  return total
