"""A training state as named tensors, and back: layers and tables by their own names.

  inputs.dense.layers.0.kernel      a dense parameter by its path
  model.layers.2.fm.y_NK            of a scanned layer; the state keeps all in one array
  mu.PARAMETER, nu.PARAMETER        Adam's moments of it; `count` is their number of steps
  tables.NAME.rows                  a table's rows in its own order, without the stack's padding
  tables.NAME.v, .m, .n             slots of its optimiser
  tables.NAME.marks, clock          shrinking that is still due; see gemjax/embedding/stack.py

Nothing else of a state is carried: a converted run begins at step 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemjax.checkpoint.streamed import Streamed
from gemjax.convert.tensors import ConvertError, Tensor, Tensors, of_array
from gemjax.embedding.stack import Stack
from gemjax.train.state import NEVER, Trainer, init_state, table_key

ROWS, MARKS, CLOCK, COUNT = "rows", "marks", "clock", "count"


class Part(NamedTuple):
  """A tensor and where the state keeps it."""

  name: str
  leaf: str  # Path of the state's array, joined by dots.
  shape: tuple[int, ...]
  dtype: np.dtype
  layer: int | None = None  # Its place on the first axis of the leaf.
  table: str | None = None  # Its rows lie in the leaf as the table's do in its stack.


def parts(trainer: Trainer) -> list[Part]:
  """Every tensor that is carried, array after array of the state.

  Raises:
    ConvertError: the tables are of a type that is not converted.
  """
  if (dtype := trainer.config.embedding.dtype) not in ("float32", "bfloat16"):
    raise ConvertError(
      f"config.embedding.dtype is {dtype!r}, whose rows have scales; only tables in float32 and "
      "bfloat16 are converted"
    )
  scanned = _scanned(trainer)
  found, clock = [], False
  for leaf, array in _leaves(trainer).items():
    shape, dtype = array.shape, np.dtype(array.dtype)
    if leaf.startswith("stacks."):
      name, kind = leaf.removeprefix("stacks.").split(".", 1)
      kind = {"rows_RW": ROWS, "marks_R": MARKS}.get(kind, kind.removeprefix("slots."))
      if kind == CLOCK:  # The same in all stacks.
        found += [] if clock else [Part(CLOCK, leaf, shape, dtype)]
        clock = True
        continue
      for table, size in trainer.features.tables.items():
        if table in trainer.tables.layout.tables and _stack(trainer, table).name == name:
          found.append(Part(f"tables.{table}.{kind}", leaf, (size, *shape[1:]), dtype, table=table))
      continue
    if (kind := _moment(leaf)) is None:
      continue
    prefix, path = kind
    if path in scanned:
      first, last = path.split(".layers.", 1)
      for i in range(shape[0]):
        name = f"{prefix}{first}.layers.{i}.{last}"
        found.append(Part(name, leaf, shape[1:], dtype, layer=i))
    else:
      found.append(Part(prefix + path, leaf, shape, dtype))
  return found


def tensors_of(trainer: Trainer, read: Callable[..., np.ndarray]) -> Tensors:
  """The tensors of a state whose arrays `read(leaf, start, stop)` returns rows of.

  Of a stack with several tables all rows are in memory while its tables are read.
  """
  held: dict[str, np.ndarray] = {}

  def whole(leaf: str) -> np.ndarray:
    if leaf not in held:
      held.clear()  # Before the next one is read: there is never room for two.
      held[leaf] = read(leaf)
    return held[leaf]

  def tensor(part: Part) -> Tensor:
    if part.table is not None:
      take = lambda rows: whole(part.leaf)[_positions(trainer, part.table, rows)]
      return Tensor(part.shape, part.dtype, lambda start, stop: take(np.arange(start, stop)), take)
    if part.layer is not None:

      def rows(start: int, stop: int) -> np.ndarray:
        return read(part.leaf, part.layer, part.layer + 1)[0][start:stop]

    elif part.shape:
      rows = lambda start, stop: read(part.leaf, start, stop)
    else:
      rows = lambda start, stop: read(part.leaf)[None]
    return Tensor(part.shape, part.dtype, rows)

  return {part.name: tensor(part) for part in parts(trainer)}


def state_of(trainer: Trainer, tensors: Tensors) -> Any:
  """The state before the first step with these weights, a tree of `Streamed`; inverse of
  `tensors_of`.

  Rows of padding are zeros. Of a stack half the rows are in memory while it is written.
  """
  by_leaf: dict[str, list[Part]] = {}
  for part in parts(trainer):
    by_leaf.setdefault(part.leaf, []).append(part)
  clocks = [leaf for leaf in _leaves(trainer) if leaf.endswith(f".{CLOCK}")]
  by_leaf |= dict.fromkeys(clocks, by_leaf[clocks[0]]) if clocks else {}

  def streamed(leaf: str, like: Any) -> Streamed:
    its = by_leaf.get(leaf, [])
    if not its:
      return _streamed(of_array(np.full(like.shape, _born(trainer, leaf), like.dtype)))
    if its[0].table is not None:
      return Streamed(
        like.shape, like.dtype, lambda rows: _stacked(trainer, like, its, tensors, rows)
      )
    if its[0].layer is not None:
      layers = lambda rows: _grouped((tensors[part.name].whole()[None] for part in its), rows)
      return Streamed(like.shape, like.dtype, layers)
    return _streamed(tensors[its[0].name])

  abstract = trainer.abstract()
  leaves = [streamed(name, like) for name, like in _leaves(trainer).items()]
  return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def fresh(trainer: Trainer) -> Tensors:
  """The tensors as a run is born with them: dense ones all computed together, rows as needed."""
  seed = trainer.config.train.seed
  params = functools.cache(
    lambda: named(jax.device_get(jax.jit(lambda: init_state(trainer, seed).params)()))
  )
  born = jax.jit(trainer.tables.born, static_argnums=1)

  def tensor(part: Part) -> Tensor:
    if part.name == f"tables.{part.table}.{ROWS}":
      stack = _stack(trainer, part.table)

      def rows(start: int, stop: int) -> np.ndarray:
        # A stack of more than 2^32 rows gives some of them the numbers of others.
        at_N = _positions(trainer, part.table, np.arange(start, stop)).astype(np.uint32)
        return np.asarray(born(table_key(seed), stack, at_N)).astype(part.dtype)

      return Tensor(part.shape, part.dtype, rows)
    if part.leaf.startswith("params."):
      pick = lambda array: array if part.layer is None else array[part.layer]
      rows = lambda start, stop: pick(params()[part.leaf.removeprefix("params.")])[start:stop]
      return Tensor(part.shape, part.dtype, rows)
    # What optimisers accumulate begins at zero.
    zeros = np.broadcast_to(np.zeros((), part.dtype), part.shape or (1,))
    return Tensor(part.shape, part.dtype, lambda start, stop: zeros[start:stop])

  return {part.name: tensor(part) for part in parts(trainer)}


def settled(trainer: Trainer, tensors: Tensors) -> Tensors:
  """Tables as a dense optimiser would have them now: shrunk, without marks and clock."""
  kept = {n: t for n, t in tensors.items() if n != CLOCK and not n.endswith(f".{MARKS}")}
  for table in trainer.tables.layout.tables:
    rule = trainer.tables.rule(_stack(trainer, table))
    if not rule.shrinks:
      continue
    stored = {n.rsplit(".", 1)[1]: t for n, t in tensors.items() if table_of(n) == table}

    def read(start: int, stop: int, rule=rule, stored=stored) -> np.ndarray:
      arrays = {kind: jnp.asarray(t.read(start, stop)) for kind, t in stored.items()}
      rows_RW, marks_R = arrays.pop(ROWS), arrays.pop(MARKS)
      stack = Stack(rows_RW, arrays, marks_R, jnp.asarray(tensors[CLOCK].whole()))
      return np.asarray(rule.read(stack, jnp.arange(stop - start)))

    rows = stored[ROWS]
    kept[f"tables.{table}.{ROWS}"] = Tensor(rows.shape, np.dtype(np.float32), read)
  return kept


def table_of(name: str) -> str | None:
  """Of a tensor of a table; tables may have dots in their names."""
  return name.removeprefix("tables.").rsplit(".", 1)[0] if name.startswith("tables.") else None


def _leaves(trainer: Trainer) -> dict[str, Any]:
  return named(trainer.abstract())


def named(state: Any) -> dict[str, Any]:
  """The leaves of a tree by their paths, joined by dots, as Orbax names them."""
  text = lambda key: str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", ""))))
  flat = jax.tree_util.tree_leaves_with_path(state)
  return {".".join(map(text, path)): leaf for path, leaf in flat}


def _scanned(trainer: Trainer) -> set[str]:
  """Paths of the parameters whose first axis is the layer."""
  ranker = nnx.merge(trainer.graph, trainer.abstract().params)
  names = lambda param: ",".join(param.get_metadata().get("axes", ()))
  axes = nnx.to_pure_dict(nnx.state(ranker, nnx.Param), extract_fn=names)
  return {path for path, found in named(axes).items() if found.startswith("layer")}


def _moment(leaf: str) -> tuple[str, str] | None:
  """(prefix, parameter or count) of a dense array that is carried."""
  if leaf.startswith("params."):
    return "", leaf.removeprefix("params.")
  for kind in ("mu", "nu"):
    if leaf.startswith("opt_state.") and f".{kind}." in leaf:
      return f"{kind}.", leaf.split(f".{kind}.", 1)[1]
  # Of optax.adam: 0 is Adam, 1 the schedule, which begins anew.
  return ("", COUNT) if leaf.startswith("opt_state.") and leaf.endswith(".0.count") else None


def _born(trainer: Trainer, leaf: str) -> int:
  if leaf == "seed":
    return trainer.config.train.seed
  return NEVER if leaf.startswith("bad_step.") else 0


def _stack(trainer: Trainer, table: str):
  return trainer.tables.layout.positions(table)[0]


def _positions(trainer: Trainer, table: str, rows: np.ndarray) -> np.ndarray:
  stack, offset = trainer.tables.layout.positions(table)
  row = np.uint64(offset) + rows.astype(np.uint64)
  return row * np.uint64(stack.multiplier) % np.uint64(stack.rows)


def _stacked(
  trainer: Trainer, like: Any, its: list[Part], tensors: Tensors, rows: int
) -> Iterator[np.ndarray]:
  # In halves, for which tables are read twice: beside them may be a stack that they are read from.
  half = -(-like.shape[0] // (2 * rows)) * rows
  for begin in range(0, like.shape[0], half):
    array = np.zeros((min(half, like.shape[0] - begin), *like.shape[1:]), like.dtype)
    for part in its:
      done = 0
      for piece in tensors[part.name].pieces():
        row_N = np.arange(done, done + len(piece))
        at_N = _positions(trainer, part.table, row_N).astype(np.int64) - begin
        here_N = (at_N >= 0) & (at_N < len(array))
        array[at_N[here_N]] = piece[here_N]
        done += len(piece)
    for start in range(0, len(array), rows):
      yield array[start : start + rows].copy()  # Whoever holds a piece holds no half.
    del array


def _grouped(layers: Iterator[np.ndarray], rows: int) -> Iterator[np.ndarray]:
  """Layers, `rows` at a time."""
  held: list[np.ndarray] = []
  for layer in layers:
    held.append(layer)
    if len(held) == rows:
      yield np.concatenate(held)
      held = []
  if held:
    yield np.concatenate(held)


def _streamed(tensor: Tensor) -> Streamed:
  return Streamed(tensor.shape, tensor.dtype, lambda rows: tensor.pieces(rows))
