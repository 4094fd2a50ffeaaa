"""Arrays of a checkpoint written and read a piece at a time, for states larger than memory.

`Checkpoints` restores what `write_streamed` leaves, and `StoredArrays` reads what either wrote:
Orbax keeps an array under its path in the tree, joined by dots, in TensorStore.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from gemjax.checkpoint.checked import CheckedJson, CheckedState, check_digest
from gemjax.checkpoint.checkpoints import CheckpointError, Checkpoints, saved_in_pieces

# Of what is stored as one piece, which is also what is read or written at a time.
PIECE_BYTES = 2**22


class Streamed:
  """An array that is made while it is written: `pieces(n)` yields its rows, n at a time."""

  def __init__(
    self, shape: tuple[int, ...], dtype: Any, pieces: Callable[[int], Iterator[np.ndarray]]
  ):
    self.shape, self.dtype, self.pieces = shape, np.dtype(dtype), pieces
    self.size = math.prod(shape)  # Orbax asks for it.


class StoredArrays:
  """The arrays of a checkpoint, the latest unless `step` is named; checked once, as a whole.

  Raises:
    CheckpointError: there is no such checkpoint, or its files are not what was written.
  """

  def __init__(self, directory: pathlib.Path, step: int | None = None):
    checkpoints = Checkpoints(directory, read_only=True)
    self.notes = checkpoints.notes(step)
    self.step = checkpoints.steps[-1] if step is None else step
    checkpoints.close()
    self._folder = pathlib.Path(directory).absolute() / f"{self.step:09d}" / "state"
    try:
      check_digest(self._folder)
    except ValueError as error:
      raise CheckpointError(f"{error}; name another checkpoint") from error

  def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows [start, stop) of an array by its path, all of a scalar.

    Raises:
      CheckpointError: the checkpoint has no such array.
    """
    store = self._open(name)
    if not store.shape:
      return np.asarray(store.read().result())
    stop = store.shape[0] if stop is None else stop
    out = np.empty((stop - start, *store.shape[1:]), store.dtype.numpy_dtype)
    # A piece at a time: TensorStore holds what it has read until all of it has been decoded.
    rows = (store.chunk_layout.read_chunk.shape or store.shape)[0]
    first = start // rows * rows
    for at in range(first, stop, rows):
      a, b = max(at, start), min(at + rows, stop)
      out[a - start : b - start] = store[a:b].read().result()
    return out

  def shape(self, name: str) -> tuple[int, ...]:
    """Of an array by its path; raises as `read`."""
    return self._open(name).shape

  def _open(self, name: str) -> ts.TensorStore:
    kvstore = {"driver": "ocdbt", "base": f"file://{self._folder}/", "path": f"{name}/"}
    try:
      return ts.open({"driver": "zarr", "kvstore": kvstore}, read=True).result()
    except ValueError as error:
      raise CheckpointError(
        f"{self._folder} has no array {name!r}; it is of another shape than its config"
      ) from error


def write_streamed(directory: pathlib.Path, step: int, state: Any, notes: dict[str, Any]) -> None:
  """Writes one checkpoint; at no time more than a piece of one array is held here.

  Args:
    directory: Of the checkpoints.
    step: Of the checkpoint.
    state: Tree of `Streamed`.
    notes: JSON.

  Raises:
    OSError: it could not be written.
  """
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  registry.add("state", ocp.args.StandardSave, _StreamedState())
  registry.add("notes", ocp.args.JsonSave, CheckedJson())
  options = ocp.CheckpointManagerOptions(
    step_format_fixed_length=9, enable_async_checkpointing=False, create=True
  )
  directory = pathlib.Path(directory).absolute()
  manager = ocp.CheckpointManager(directory, options=options, handler_registry=registry)
  try:
    pieces = saved_in_pieces(state, PIECE_BYTES)
    args = ocp.args.Composite(state=pieces, notes=ocp.args.JsonSave(notes))
    manager.save(step, args=args, force=True)
  except ValueError as error:  # How TensorStore reports the operating system's errors.
    raise OSError(f"writing {directory} failed ({str(error).splitlines()[0][:200]})") from error
  finally:
    manager.close()


class _StreamedHandler(ocp.type_handlers.NumpyHandler):
  """Writes one array after the other, each piece by piece."""

  def __init__(self):
    super().__init__(deepcopy_host_arrays=False)

  def typestr(self) -> str:
    return "jax.Array"  # As which it is restored.

  async def _open_and_write(self, value: Streamed, tspec: dict[str, Any], ts_context) -> None:
    # It waits for each piece, so that the arrays, which Orbax writes side by side, take turns.
    store = ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context).result()
    done, rows = 0, (store.chunk_layout.write_chunk.shape or (1,))[0]
    for piece in value.pieces(rows):
      at = store[done : done + len(piece)] if value.shape else store
      at.write(piece.reshape(at.shape)).result()
      done += len(piece)


class _StreamedState(CheckedState):
  """A tree of `Streamed`."""

  def __init__(self):
    super().__init__()
    registry = ocp.type_handlers.create_type_handler_registry((Streamed, _StreamedHandler()))
    self._supported_types = (Streamed,)
    self._impl = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
