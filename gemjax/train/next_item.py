"""Training of a sequence tower on the next item, and its ranking of all items.

The protocol is that of generative-recommenders: a user's last item is held out, the newest ones
before it train; then all items are ranked but those among the `length` events that are read. What
it leaves open: equal scores count against the target; the last epoch is reported, not the best.
The split "valid" is there to choose by: it holds out the item before the last, and never reads the
last. One device; the item table is a dense parameter, all of whose rows Adam updates.

Letters: E slots for events, B users of a batch, U users, V items, N negatives, D width.
"""

from __future__ import annotations

import math
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from gemjax import fields
from gemjax.checkpoint import Checkpoints
from gemjax.config.next_item import NextItem
from gemjax.data.next_item import Batch, Sequences, read_events
from gemjax.layers.dropout import Key, example_keys
from gemjax.metrics.ranking import ranking, ranks
from gemjax.models.next_item import NextItemTower
from gemjax.train.cache import Cache
from gemjax.train.optimizer import dense_optimizer
from gemjax.train.workdir import CHECKPOINTS, SUMMARY, Workdir, WorkdirError, write_json
from pallas_kernels.segments import segment_of_rows

# Items at the end of every user that training, and the question asked of it, must not read.
_HELD_OUT = {"test": 0, "valid": 1}


class NotFiniteError(RuntimeError):
  """A loss that is no number."""


class State(NamedTuple):
  """All that training changes."""

  step: jax.Array
  params: Any
  opt_state: optax.OptState


def next_item_loss(
  tower: NextItemTower,
  x_ED: jax.Array,
  next_E: jax.Array,
  negative_N: jax.Array | None,
  known_V: np.ndarray | None = None,
) -> jax.Array:
  """Mean over events of -log softmax(score)[next], in nats; slots with next -1 do not count.

  With `negative_N`, items drawn alike and without repetition, the softmax is taken over the next
  item and the others among them, each of which stands for (V - 1) / N items; V counts those of
  `known_V`, or all.
  """
  items = tower.item_VD.shape[0] if known_V is None else len(known_V)
  real_E = next_E >= 0
  next_E = jnp.maximum(next_E, 0)
  if negative_N is None:
    score_EV = _of_known(tower.score(x_ED), known_V)
    right_E = jnp.take_along_axis(score_EV, next_E[:, None], axis=1)[:, 0]
    loss_E = jax.nn.logsumexp(score_EV, axis=1) - right_E
  else:
    right_E = tower.score(x_ED, next_E[:, None])[:, 0]
    score_EN = tower.score(x_ED, negative_N)
    score_EN += math.log((items - 1) / len(negative_N))
    score_EN = jnp.where(negative_N == next_E[:, None], -jnp.inf, score_EN)
    loss_E = jnp.logaddexp(jax.nn.logsumexp(score_EN, axis=1), right_E) - right_E
  return jnp.sum(jnp.where(real_E, loss_E, 0)) / jnp.maximum(jnp.sum(real_E), 1)


def _of_known(score_QV: jax.Array, known_V: np.ndarray | None) -> jax.Array:
  """Scores of items that have no event become -inf."""
  if known_V is None or len(known_V) == score_QV.shape[1]:
    return score_QV
  known = np.isin(np.arange(score_QV.shape[1]), known_V)
  return jnp.where(known, score_QV, -jnp.inf)


class Trainer:
  """The programs of one run; the items that have an event are all, or `known_V`."""

  def __init__(self, config: NextItem, items: int, steps: int, known_V: np.ndarray | None = None):
    self.config, self.items = config, items
    self.known_V = np.arange(items) if known_V is None else known_V
    self.optimizer = dense_optimizer(config.optimizer, steps)
    self.graph = nnx.graphdef(nnx.eval_shape(self._tower))
    self.born = jax.jit(self._born)
    self.step = jax.jit(self._step, donate_argnums=0)
    self.ranks = jax.jit(self._ranks)

  def _tower(self) -> NextItemTower:
    config = self.config
    rngs = nnx.Rngs(config.seed)
    return NextItemTower(config.tower, items=self.items, length=config.length, rngs=rngs)

  def _born(self) -> State:
    params = nnx.to_pure_dict(nnx.state(self._tower(), nnx.Param))
    return State(jnp.zeros((), jnp.int32), params, self.optimizer.init(params))

  def _step(self, state: State, batch: Batch) -> tuple[State, jax.Array]:
    # A key of (seed, step): a resumed run draws what the unbroken one would have drawn.
    key = jax.random.fold_in(jax.random.key(self.config.seed), state.step)
    key_B = example_keys(jax.random.fold_in(key, 0), 0, len(batch.offsets_B1) - 1)
    negative_N, drawn = None, self.config.tower.negatives
    if 0 < drawn < len(self.known_V):
      drawn_key = jax.random.fold_in(key, 1)
      negative_N = jax.random.choice(drawn_key, self.known_V, (drawn,), replace=False)

    def loss_of(params):
      tower = nnx.merge(self.graph, params)
      x_ED = self.queries(tower, batch, key_B)
      return next_item_loss(tower, x_ED, batch.next_E, negative_N, self.known_V)

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
    return State(state.step + 1, optax.apply_updates(state.params, updates), opt_state), loss

  @staticmethod
  def queries(tower: NextItemTower, batch: Batch, key_B: Key = None) -> jax.Array:
    """x_ED of every event; dropout where there are keys."""
    return tower(batch.item_E, batch.age_E, batch.offsets_B1, key_B, next_age_E=batch.next_age_E)

  def _ranks(self, params, batch: Batch) -> jax.Array:
    """rank_B of the item after each user's newest event."""
    tower = nnx.merge(self.graph, params)
    x_ED = self.queries(tower, batch)
    newest_B = jnp.maximum(batch.offsets_B1[1:] - 1, 0)
    score_BV = _of_known(tower.score(x_ED[newest_B]), self.known_V)
    user_E = segment_of_rows(batch.offsets_B1, len(batch.item_E))
    score_BV = score_BV.at[user_E, batch.item_E].set(-jnp.inf, mode="drop")  # Room: no user.
    return ranks(score_BV, jnp.maximum(batch.next_E[newest_B], 0))


def train_next_item(config: NextItem, workdir: pathlib.Path) -> dict[str, Any]:
  """Trains to the last epoch and returns the summary; the same call resumes what was interrupted.

  Raises:
    ConfigError, RawDataError, WorkdirError: before any work.
    CheckpointError: a checkpoint cannot be read or written.
    NotFiniteError: with the epoch; the last checkpoint is from before.
  """
  config.validate()
  events = read_events(pathlib.Path(config.path), own_ids=config.own_ids)
  held_out = _HELD_OUT[config.split]
  train = Sequences(events, config.length, held_out + 1, config.batch_size)
  asked = Sequences(events, config.length, held_out, config.batch_size)
  trainer = Trainer(config, events.items, config.epochs * train.batches, events.known_V)
  with (
    Workdir(workdir) as folder,
    Checkpoints(folder.path / CHECKPOINTS) as checkpoints,
    Cache.of_run(folder.path).behind_jax(),
  ):
    state, notes = _begin(trainer, checkpoints)
    if checkpoints.steps and not int(state.step):  # Converted: how good are others' weights?
      print(_line(0, config, ranking(ranks_of_next(trainer, state.params, asked))), flush=True)
    for epoch in range(int(state.step) // train.batches, config.epochs):
      start = time.perf_counter()
      rng = np.random.default_rng((config.seed, epoch))
      losses = []
      for batch in train.epoch(rng):
        state, loss = trainer.step(state, batch)
        losses.append(loss)
      notes["loss"] = float(np.mean(jax.device_get(losses)))
      notes["seconds"] += time.perf_counter() - start
      done = epoch + 1
      if not math.isfinite(notes["loss"]):
        raise NotFiniteError(
          f"epoch {done}: the loss is {notes['loss']}; lower config.optimizer.learning_rate, or "
          "set config.optimizer.clip_norm"
        )
      found = {}
      if done % config.eval_every == 0 or done == config.epochs:
        notes["found"] = found = ranking(ranks_of_next(trainer, state.params, asked))
        checkpoints.save(int(state.step), state, notes, best=None)
      line = _line(done, config, {"loss": notes["loss"]} | found)
      print(f"{line}  {notes['seconds']:,.0f} s", flush=True)
    checkpoints.wait()
    summary = {
      "name": config.name,
      "train": {
        "loss": notes["loss"],
        "epochs": config.epochs,
        "steps": int(state.step),
        "seconds": notes["seconds"],  # Compilation included.
        "sequences_per_second": config.epochs * len(train.length_U) / notes["seconds"],
        "events_per_second": config.epochs * int(train.length_U.sum()) / notes["seconds"],
      },
      config.split: notes["found"] | {"users": len(asked.length_U), "items": len(events.known_V)},
      "params": sum(x.size for x in jax.tree.leaves(state.params)),
      "device": jax.devices()[0].device_kind,
      "seed": config.seed,
    }
    write_json(folder.path / SUMMARY, summary)
  return summary


def ranks_of_next(trainer: Trainer, params: Any, asked: Sequences) -> np.ndarray:
  """rank_U of every user's next item."""
  rank_U = np.empty(len(asked.length_U), np.int32)
  order_U = np.argsort(-asked.length_U, kind="stable")
  for i in range(asked.batches):  # Users of all lengths, as `room` wants them.
    user_B = order_U[i :: asked.batches]
    rank_U[user_B] = trainer.ranks(params, asked.pack(user_B))[: len(user_B)]
  return rank_U


def _line(epoch: int, config: NextItem, figures: dict[str, float]) -> str:
  text = "".join(f"  {name} {x:.4f}" for name, x in figures.items())
  return f"epoch {epoch:>3}/{config.epochs}{text}"


def _begin(trainer: Trainer, checkpoints: Checkpoints) -> tuple[State, dict[str, Any]]:
  """The state and the notes of the last checkpoint, or those before the first step."""
  tree = trainer.config.to_json()
  if not checkpoints.steps:
    return trainer.born(), {"config": tree, "seconds": 0.0}
  restored = checkpoints.restore(jax.eval_shape(trainer.born))
  # A field that is younger than the run had its default.
  before = NextItem.from_json(restored.notes["config"]).to_json()
  if found := fields.difference(before, tree, free=("name", "path")):
    raise WorkdirError(f"the folder holds a run in which {found}; name another --workdir")
  for sentence in restored.passed:
    print(sentence, flush=True)
  print(f"resuming from the checkpoint of step {restored.step:,}", flush=True)
  return restored.state, restored.notes
