"""Values that are not finite: where training first met one, and what its owner is told."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gemjax.train.state import NEVER, Trainer, TrainState


class NonFiniteError(RuntimeError):
  """Training met a value that is not finite.

  Args:
    trainer: Of the run.
    step: Steps done before the one that met it.
    parts: Names of what was not finite.
    kept: Steps of the checkpoints, all from before.
  """

  def __init__(self, trainer: Trainer, step: int, parts: list[str], kept: list[int]):
    tables = trainer.config.embedding.learning_rate * float(trainer.share(step))
    super().__init__(
      f"step {step + 1:,}: not finite: {', '.join(parts)}; the learning rates were "
      f"{learning_rate(trainer, step):.3g} (dense) and {tables:.3g} (tables); "
      + (f"the checkpoint of step {kept[-1]:,} is intact; " if kept else "")
      + "lower them, or set config.optimizer.clip_norm"
    )


def learning_rate(trainer: Trainer, step: int) -> float:
  """Of the dense parameters."""
  return trainer.config.optimizer.learning_rate * float(trainer.share(step))


def first_not_finite(state: TrainState) -> tuple[int, list[str]] | None:
  """(step, parts) of what was not finite first, or is not finite now."""
  bad = {part: int(step) for part, step in jax.device_get(state.bad_step).items()}
  step = min(bad.values())
  if step != NEVER:
    return step, [part for part, first in bad.items() if first == step]
  tree = {n: getattr(state, n) for n in ("params", "opt_state", "stacks")}
  finite = jax.tree_util.tree_leaves_with_path(jax.device_get(_finite(tree)))
  parts = [jax.tree_util.keystr(path) for path, ok in finite if not ok]
  return (int(state.step) - 1, parts) if parts else None


@jax.jit
def _finite(tree):
  return jax.tree.map(lambda x: jnp.isfinite(x).all(), tree)
