"""The training objective."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def binary_cross_entropy(
  logits_BT: jax.Array, label_BT: jax.Array, weight_B: jax.Array, task_weight_T: jax.Array
) -> jax.Array:
  """sum_t c_t sum_b w_b (softplus(x_bt) - y_bt x_bt) / sum_b w_b, in nats; a scalar."""
  loss_BT = jax.nn.softplus(logits_BT) - label_BT * logits_BT
  mean_T = jnp.einsum("bt,b->t", loss_BT, weight_B) / jnp.maximum(weight_B.sum(), 1)
  return mean_T @ task_weight_T
