"""Steps that take turns within one process, so that a ratio of their times comes from one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import jax
from tqdm import tqdm

from gemjax.features import Batch
from gemjax.train.state import Trainer, TrainState
from gemjax.train.step import plan_step, train_step

REPEATS = 9


def jitted_step(trainer: Trainer):
  """(state, batch) -> (state, loss). As in training, where the plan comes from the step before and
  the next one's is made.
  """

  def step(state, batch):
    state, _, report = train_step(trainer, state, plan_step(trainer, batch), batch, batch)
    return state, report.loss

  return jax.jit(step, donate_argnums=0)


def stepper(step, state: TrainState, batch: Batch) -> tuple[Callable[[], None], int]:
  """A function that takes a step and waits for it, and the bytes of its temporaries."""
  compiled = step.lower(state, batch).compile()

  def take():
    nonlocal state
    state, loss = compiled(state, batch)
    jax.block_until_ready((state, loss))

  return take, compiled.memory_analysis().temp_size_in_bytes


def take_turns(
  work: dict[str, Callable[[], None]], name: str, repeats: int = REPEATS
) -> dict[str, float]:
  """Median seconds of each, one after the other, `repeats` times after one warm-up."""
  seconds = {n: [] for n in work}
  for _ in tqdm(range(repeats + 1), desc=name):
    for n, take in work.items():
      start = time.perf_counter()
      take()
      seconds[n].append(time.perf_counter() - start)
  return {n: statistics.median(s[1:]) for n, s in seconds.items()}
