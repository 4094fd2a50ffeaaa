"""One training step, and prediction: pure functions to be jitted.

The step runs in `jax.shard_map`, the code of one device with its collectives in sight. Letters as
everywhere; arrays are this device's part, B = global batch / devices.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from gemjax import metrics
from gemjax.config import DATA, MODEL
from gemjax.embedding import Plans, Rows, Stacks
from gemjax.features import Batch
from gemjax.layers.dropout import example_keys
from gemjax.parallel.arrays import BATCH
from gemjax.parallel.placement import reduce_gradients
from gemjax.train.losses import binary_cross_entropy, next_events
from gemjax.train.state import Trainer, TrainState

REPLICATED = PartitionSpec()
ALL = (DATA, MODEL)


class Report(NamedTuple):
  """What a step tells of itself."""

  loss: jax.Array  # Before the step, of the labels alone.
  next_event: jax.Array  # The loss of what histories tell of themselves, without its weight; or 0.
  exchange_rounds: jax.Array  # 1 where the capacity sufficed; 0 where nothing is exchanged.


class Owed(NamedTuple):
  """The update of tables that the step before has left to this one."""

  plans: Plans
  grads: Rows  # With respect to the looked-up rows.
  rate_1: jax.Array  # The learning rate of that step.


class Ahead(NamedTuple):
  """What a step is given beside the state and its batch: what is known of that one already, and
  where `embedding.lookup` is "ahead" its rows, and what the tables are owed.
  """

  plans: Plans
  rows: Rows | None = None  # Read behind the update of the step before the last.
  owed: Owed | None = None


class _Result(NamedTuple):
  """Of the part of a step that a device computes."""

  grads: Any  # Of dense parameters, summed over the batch and placed as they are.
  stacks: Stacks
  ahead: Ahead  # Of the upcoming step.
  sums: metrics.MetricSums
  finite: dict[str, jax.Array]  # Part -> a number that is finite if the part is.
  report: Report


def train_step(
  trainer: Trainer, state: TrainState, ahead: Ahead, batch: Batch, upcoming: Batch
) -> tuple[TrainState, Ahead, Report]:
  """(state, batch) -> (state after one step, what the upcoming one is given, report).

  Donate the state. The gradient is taken with respect to the dense parameters and the looked-up
  rows; no array of a table's shape exists but the table itself, updated in place. The upcoming
  batch gives its ids alone, whose exchange waits for nothing in this step.

  With `embedding.lookup` "ahead" the tables get the gradients of the step before, then the rows of
  the upcoming batch are read: a row is one update old, as it would be if it were read in front of
  this step's own update, and neither exchange of rows or gradients waits for anything in this step,
  nor anything in it for them; the forward pass begins when that batch's plan is made. The new state
  lacks this step's update until the next one or `settle_step`.
  """
  specs = trainer.specs
  result = _Result(
    grads=specs.params, stacks=specs.stacks, ahead=BATCH, sums=REPLICATED, finite=REPLICATED,
    report=REPLICATED,
  )  # fmt: skip
  on_device = _on_devices(
    trainer,
    functools.partial(_device_step, trainer),
    (REPLICATED, REPLICATED, specs.params, specs.stacks, BATCH, BATCH, BATCH),
    result,
  )
  done = on_device(state.step, state.seed, state.params, state.stacks, ahead, batch, upcoming)
  updates, opt_state = trainer.optimizer.update(done.grads, state.opt_state, state.params)
  bad_step = {
    part: jnp.where(jnp.isfinite(done.finite[part]), first, jnp.minimum(first, state.step))
    for part, first in state.bad_step.items()
  }
  new_state = TrainState(
    step=state.step + 1,
    seed=state.seed,
    params=optax.apply_updates(state.params, updates),
    opt_state=opt_state,
    stacks=done.stacks,
    sums=metrics.merge(state.sums, done.sums),
    bad_step=bad_step,
  )
  return new_state, done.ahead, done.report


def plan_step(trainer: Trainer, batch: Batch) -> Ahead:
  """Of a batch that follows no step: nothing is owed; its step, or `look_up_step`, reads rows."""

  def plan(batch):
    if trainer.config.embedding.lookup != "ahead":
      return Ahead(trainer.tables.plan(batch))
    return Ahead(trainer.tables.plan(batch), owed=_nothing(trainer, batch))

  return _on_devices(trainer, plan, (BATCH,), BATCH)(batch)


def look_up_step(trainer: Trainer, state: TrainState, ahead: Ahead) -> Ahead:
  """With the rows as the state has them, to which nothing may be owed."""
  specs = (trainer.specs.stacks, BATCH)
  look_up = _on_devices(trainer, functools.partial(_looked_up, trainer), specs, BATCH)
  return ahead._replace(rows=look_up(state.stacks, ahead.plans))


def settle_step(trainer: Trainer, state: TrainState, owed: Owed) -> TrainState:
  """The state with what its tables are owed. Donate the state."""
  specs = trainer.specs.stacks
  settle = _on_devices(
    trainer, functools.partial(_settled, trainer), (REPLICATED, REPLICATED, specs, BATCH), specs
  )
  return state._replace(stacks=settle(state.step, state.seed, state.stacks, owed))


def predict_step(trainer: Trainer, state: TrainState, batch: Batch) -> jax.Array:
  """logits_BT float32, without dropout, split as the batch."""

  def predict(params, stacks, batch):
    rows = _looked_up(trainer, stacks, trainer.tables.plan(batch))
    return trainer.predict(params, rows, batch)

  specs = (trainer.specs.params, trainer.specs.stacks, BATCH)
  return _on_devices(trainer, predict, specs, BATCH)(state.params, state.stacks, batch)


def average_step(trainer: Trainer, state: TrainState) -> TrainState:
  """Makes the tables of the `data` groups equal, where each updates its own. Donate the state."""
  # Another stream than that of the steps, which fold small numbers.
  key = jax.random.fold_in(jax.random.key(state.seed), 2**32 - 1)
  specs = trainer.specs.stacks
  average = _on_devices(trainer, trainer.tables.average, (specs, REPLICATED), specs)
  return state._replace(stacks=average(state.stacks, jax.random.fold_in(key, state.step)))


def bucket_step(trainer: Trainer, batch: Batch) -> dict[str, jax.Array]:
  """Row stack -> the most different rows that any device wants of any owner."""

  def largest(batch):
    sizes = trainer.tables.bucket_sizes(batch)
    return {name: jax.lax.pmax(jnp.max(size_L), ALL) for name, size_L in sizes.items()}

  return _on_devices(trainer, largest, (BATCH,), REPLICATED)(batch)


def _device_step(trainer: Trainer, step, seed, params, stacks, ahead, batch, upcoming) -> _Result:
  config, tables = trainer.config, trainer.tables
  plans, rows, owed = ahead
  key = _key(seed, step)
  examples = len(batch.weight_B)
  key_B = example_keys(jax.random.fold_in(key, 0), jax.lax.axis_index(ALL) * examples, examples)
  task_weight_T = jnp.array([config.train.task_weights.get(t, 1.0) for t in trainer.features.tasks])
  total_weight = jax.lax.psum(batch.weight_B.sum(), ALL)
  with jax.named_scope("plan"):
    known = Ahead(tables.plan(upcoming))
  if owed is not None:
    stacks = _settled(trainer, step, seed, stacks, owed)
  if rows is None:
    rows = _looked_up(trainer, stacks, plans)
  if owed is not None:
    # Found before the forward pass, while the first kernels are gathered: XLA would leave it to the
    # end, where its small collectives wait behind large ones.
    upcoming_plans, rows = jax.lax.optimization_barrier((known.plans, rows))
    known = Ahead(upcoming_plans, _looked_up(trainer, stacks, upcoming_plans))

  def loss_of(params, rows):
    logits_BT, following = trainer.apply(params, rows, batch, key_B)
    loss = binary_cross_entropy(
      logits_BT, batch.label_BT, batch.weight_B, task_weight_T, total_weight
    )
    next_event = next_events(following)
    objective = loss + getattr(config.model, "next_event", 0) * next_event
    return objective, (loss, next_event, logits_BT)

  with_gradient = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
  (objective, told), (dense_grad, rows_grad) = with_gradient(params, rows)
  loss, next_event, logits_BT = told
  dense_grad = reduce_gradients(dense_grad, trainer.specs.params)
  learning_rate = config.embedding.learning_rate * trainer.share(step)
  # Written out by rows: read in another order below, a sum still to be done would be done anew for
  # every float, down the columns of units. (For XLA on CPUs see
  # `pallas_kernels/sum_runs/xla.py`.)
  rows_grad = jax.lax.optimization_barrier(rows_grad)
  if owed is None:
    stacks = _updated(trainer, stacks, plans, rows_grad, learning_rate, key)
  else:
    known = known._replace(owed=Owed(plans, rows_grad, learning_rate[None]))
  finite = {"loss": objective}
  for outer, tree in dense_grad.items():
    finite |= {f"gradient of {outer}.{inner}": _total(t) for inner, t in tree.items()}
  finite |= {f"gradient of tables {name}": _total(g) for name, g in rows_grad.items()}
  sums = metrics.of_batch(logits_BT, batch.label_BT, batch.weight_B)
  loss, next_event, sums, finite = jax.lax.psum((loss, next_event, sums, finite), ALL)
  report = Report(loss, next_event, tables.rounds(plans))
  return _Result(dense_grad, stacks, known, sums, finite, report)


def _key(seed, step) -> jax.Array:
  """Of (seed, step): a resumed run draws what the unbroken one would have drawn."""
  return jax.random.fold_in(jax.random.key(seed), step)


@jax.named_scope("lookup")
def _looked_up(trainer: Trainer, stacks: Stacks, plans: Plans) -> Rows:
  """In the type that the model computes in, to which it would round them first of all. So are their
  gradients; of an event's, which several parts of a model read, they are added in it.
  """
  narrow = lambda rows_MW: rows_MW.astype(trainer.config.train.dtype)
  return jax.tree.map(narrow, trainer.tables.lookup(stacks, plans))


@jax.named_scope("update")
def _updated(trainer: Trainer, stacks, plans, grads, learning_rate, key) -> Stacks:
  return trainer.tables.update(stacks, plans, grads, learning_rate, jax.random.fold_in(key, 1))


def _settled(trainer: Trainer, step, seed, stacks, owed: Owed) -> Stacks:
  """With what the step before `step` has left."""
  plans, grads, (learning_rate,) = owed
  return _updated(trainer, stacks, plans, grads, learning_rate, _key(seed, step - 1))


def _nothing(trainer: Trainer, batch: Batch) -> Owed:
  """An update of no row, in the shapes of that of `batch`."""
  plans, grads = trainer.tables.of_no_row(batch, trainer.config.train.dtype)
  return Owed(plans, grads, jnp.zeros((1,)))


def _on_devices(trainer: Trainer, function, in_specs, out_specs):
  # Unchecked: JAX cannot know that merged updates keep the copies of a table equal.
  return jax.shard_map(
    function, mesh=trainer.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
  )


def _total(tree) -> jax.Array:
  """A scalar that is finite if every entry is (barring an overflow of the sum of |x|)."""
  return sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(tree))
