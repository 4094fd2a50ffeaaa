"""One training step, and prediction; both are pure functions to be jitted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from gemjax import metrics
from gemjax.embedding import stack_ids
from gemjax.features import Batch
from gemjax.train.losses import binary_cross_entropy
from gemjax.train.state import Trainer, TrainState


def train_step(trainer: Trainer, state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
  """(state, batch) -> (state after one step, loss before it). Donate the state.

  The gradient is taken with respect to the dense parameters and the looked-up rows; no array of a
  table's shape exists but the table itself, which is updated in place.
  """
  config = trainer.config
  ids = stack_ids(trainer.layout, batch)
  rows = {w: trainer.rule.lookup(s, ids[w]) for w, s in state.stacks.items()}
  # A key of (seed, step): a resumed run draws what the unbroken one would have drawn.
  key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
  task_weight_T = jnp.array([config.train.task_weights.get(t, 1.0) for t in trainer.features.tasks])

  def loss_of(params, rows):
    logits_BT = trainer.predict(params, rows, batch, jax.random.fold_in(key, 0))
    loss = binary_cross_entropy(logits_BT, batch.label_BT, batch.weight_B, task_weight_T)
    return loss, logits_BT

  with_gradient = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
  (loss, logits_BT), (dense_grad, rows_grad) = with_gradient(state.params, rows)

  updates, opt_state = trainer.optimizer.update(dense_grad, state.opt_state, state.params)
  learning_rate = config.embedding.learning_rate * trainer.share(state.step)
  stacks = {
    w: trainer.rule.update(s, ids[w], rows_grad[w], learning_rate, jax.random.fold_in(key, w))
    for w, s in state.stacks.items()
  }
  finite = {"loss": loss}
  for outer, tree in dense_grad.items():
    finite |= {f"gradient of {outer}.{inner}": _total(t) for inner, t in tree.items()}
  finite |= {f"gradient of tables of width {w}": _total(g) for w, g in rows_grad.items()}
  bad_step = {
    part: jnp.where(jnp.isfinite(finite[part]), first, jnp.minimum(first, state.step))
    for part, first in state.bad_step.items()
  }
  new_state = TrainState(
    step=state.step + 1,
    params=optax.apply_updates(state.params, updates),
    opt_state=opt_state,
    stacks=stacks,
    sums=metrics.update(state.sums, logits_BT, batch.label_BT, batch.weight_B),
    bad_step=bad_step,
  )
  return new_state, loss


def predict_step(trainer: Trainer, state: TrainState, batch: Batch) -> jax.Array:
  """logits_BT float32, without dropout."""
  ids = stack_ids(trainer.layout, batch)
  rows = {w: trainer.rule.lookup(s, ids[w]) for w, s in state.stacks.items()}
  return trainer.predict(state.params, rows, batch)


def _total(tree) -> jax.Array:
  """A scalar that is finite if every entry is (barring an overflow of the sum of |x|)."""
  return sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(tree))
