"""The libraries whose checkpoints are read and written, and the files that these come in."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from gemjax.convert import fuxictr, torcheasyrec, torchrec
from gemjax.convert.names import Entry, to_ours, to_theirs
from gemjax.convert.run_folder import Run, check_tensors
from gemjax.convert.safetensors_file import read_safetensors, write_safetensors
from gemjax.convert.tensors import ConvertError, Tensors, of_array
from gemjax.convert.torch_distributed import read_distributed
from gemjax.convert.torch_file import Tree, read_torch, write_torch
from gemjax.convert.training_state import settled
from gemjax.train.state import Trainer


class Peer(NamedTuple):
  """Another library's checkpoints."""

  entries: Callable[[Trainer, list[str]], list[Entry]]  # (run, names in the file) -> name table
  # Names of whole numbers that a state has no place for; the notes of a checkpoint keep them.
  counters: Callable[[Trainer], list[str]] = lambda trainer: []
  # What names of tables have in common whose order in a file is that of the model's units.
  units: str | None = None
  tables: bool = False  # It has nothing but tables; what is not of them is left.
  tree: Callable[[Tensors], Tree] = dict  # What a file of PyTorch holds.


PEERS = {
  "fuxictr": Peer(fuxictr.entries, counters=fuxictr.counters, units=fuxictr.EMBEDDINGS),
  "torcheasyrec": Peer(torcheasyrec.entries),
  "torchrec": Peer(torchrec.entries, tables=True, tree=torchrec.tree),
}


def read_peer(name: str, path: pathlib.Path, run: Run) -> tuple[Run, list[str]]:
  """(`run` with the tensors of a peer's file, names in the file of what it has no place for).

  Raises:
    ConvertError: the file does not hold what the config describes.
  """
  peer, what, theirs = PEERS[name], str(path), read_tensors(path)
  kept = {n: int(theirs.pop(n).whole()) for n in peer.counters(run.trainer) if n in theirs}
  entries = peer.entries(run.trainer, list(theirs))
  named = [n for entry in entries for n in entry.theirs]
  left = [n for n in theirs if n not in named] if peer.tables else []
  theirs = {n: t for n, t in theirs.items() if n not in left}
  ours = to_ours(entries, theirs, what)
  if peer.units:
    order = [n for n in theirs if n.startswith(peer.units)]
    wanted = [n for n in named if n.startswith(peer.units)]
    if order != wanted:
      first = next(i for i, (a, b) in enumerate(zip(order, wanted)) if a != b)
      raise ConvertError(
        f"{what} has {order[first]} where the data have {wanted[first]}: the order of features is "
        "that of the model's units, dense features first"
      )
  check_tensors(run.trainer, ours, what, weights=True, tables=peer.tables)
  return run._replace(tensors=ours, kept=kept), left


def as_peer(name: str, run: Run) -> tuple[Tensors, list[str]]:
  """(the run's tensors under a peer's names, those of ours that it has no place for)."""
  peer, ours = PEERS[name], settled(run.trainer, run.tensors)
  entries = peer.entries(run.trainer, [])
  theirs = to_theirs(entries, ours)
  for counter in peer.counters(run.trainer):
    theirs[counter] = of_array(np.array(run.kept.get(counter, 0), np.int64))
  used = {entry.ours for entry in entries}
  return theirs, [n for n in ours if n not in used]


def write_tensors(
  path: pathlib.Path, theirs: Tensors, tree: Callable[[Tensors], Tree] = dict
) -> None:
  """A file of safetensors where `path` ends so, otherwise what `torch.save` writes of the tree."""
  if path.suffix == ".safetensors":
    write_safetensors(path, theirs, {})
  else:
    write_torch(path, tree(theirs))


def read_tensors(path: pathlib.Path) -> Tensors:
  """Of a file of safetensors or of `torch.save`, or a folder of torch.distributed.checkpoint."""
  if path.is_dir():
    return read_distributed(path)
  if path.suffix == ".safetensors":
    return read_safetensors(path)[0]
  return read_torch(path)
