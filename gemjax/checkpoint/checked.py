"""Orbax handlers whose files carry checksums: Orbax reads back flipped bytes without a word.

A digest of all files of an item is written into its folder before the folder gets its name, in
the thread that writes the checkpoint, and compared before Orbax reads any of them.
"""

from __future__ import annotations

import json
import pathlib
import zlib

import jax
import orbax.checkpoint as ocp

DIGEST = "digest.json"
COMMITTED = "commit_success.txt"  # Orbax adds it to the finished folder.
CHUNK = 1 << 24


class CorruptError(ValueError):
  """A file that is missing, or that does not hold what was written."""


def write_digest(folder: pathlib.Path) -> None:
  """Size and crc32 of every file below `folder`, by its relative path."""
  (folder / DIGEST).write_text(json.dumps(_digest(folder)))


def check_digest(folder: pathlib.Path) -> None:
  """Raises CorruptError, which names the file, where `folder` is not what its digest says."""
  try:
    wanted = {name: tuple(v) for name, v in json.loads((folder / DIGEST).read_text()).items()}
  except (OSError, ValueError, TypeError, AttributeError) as error:
    raise CorruptError(f"{folder / DIGEST} is missing or corrupt") from error
  found = _digest(folder)
  for name, digest in wanted.items():
    if name not in found:
      raise CorruptError(f"{folder / name} is missing")
    if found[name] != digest:
      kind = "truncated" if found[name][0] < digest[0] else "corrupt (its checksum differs)"
      raise CorruptError(f"{folder / name} is {kind}")


class _Checked:
  """Mixin before a handler; both of its methods act on the folder of one item."""

  def finalize(self, directory) -> None:
    super().finalize(directory)
    if jax.process_index() == 0:
      write_digest(pathlib.Path(directory))

  def restore(self, directory, *args, **kwargs):
    check_digest(pathlib.Path(directory))
    return super().restore(directory, *args, **kwargs)


class CheckedState(_Checked, ocp.StandardCheckpointHandler):
  """Any pytree of arrays, stored as they are: weights hardly compress, and trying takes longer than
  the disk.
  """

  def __init__(self):
    super().__init__()
    self._impl = ocp.PyTreeCheckpointHandler(use_compression=False)


class CheckedJson(_Checked, ocp.JsonCheckpointHandler):
  """A JSON object."""


def _digest(folder: pathlib.Path) -> dict[str, tuple[int, int]]:
  files = [f for f in folder.rglob("*") if f.is_file() and f.name not in (DIGEST, COMMITTED)]
  return {str(f.relative_to(folder)): (f.stat().st_size, _crc32(f)) for f in sorted(files)}


def _crc32(file: pathlib.Path) -> int:
  crc = 0
  with file.open("rb") as stream:
    while chunk := stream.read(CHUNK):
      crc = zlib.crc32(chunk, crc)
  return crc
