"""Orbax handlers whose files carry checksums: Orbax reads back flipped bytes without a word.

A digest of all files of an item is written into its folder before the folder gets its name, in
the thread that writes the checkpoint, and compared before anything that was read is believed.
"""

from __future__ import annotations

import json
import os
import pathlib
import zlib
from concurrent.futures import ThreadPoolExecutor

import jax
import orbax.checkpoint as ocp

DIGEST = "digest.json"
COMMITTED = "commit_success.txt"  # Orbax adds it to the finished folder.
BLOCK = 1 << 24  # Bytes of a file that have a checksum of their own, so that threads share a file.
THREADS = min(8, os.cpu_count() or 1)


class CorruptError(ValueError):
  """A file that is missing, or that does not hold what was written."""


def write_digest(folder: pathlib.Path) -> None:
  """Size of every file below `folder`, by its relative path, and crc32 of each of its blocks."""
  files = [f for f in folder.rglob("*") if f.is_file() and f.name not in (DIGEST, COMMITTED)]
  sizes = {str(f.relative_to(folder)): f.stat().st_size for f in sorted(files)}
  blocks = _blocks(sizes)
  digest: dict[str, tuple[int, list[int]]] = {name: (size, []) for name, size in sizes.items()}
  for (name, _), crc in zip(blocks, _crc32s(folder, blocks), strict=True):
    digest[name][1].append(crc)
  (folder / DIGEST).write_text(json.dumps(digest))


def check_digest(folder: pathlib.Path, part: int = 0, parts: int = 1) -> None:
  """Raises CorruptError, which names the file, where `folder` is not what its digest says.

  Of all blocks only each `parts`-th is read, from number `part` on. Raises OSError where one cannot
  know.
  """
  try:
    digest = json.loads((folder / DIGEST).read_text())
    sizes = {str(name): int(size) for name, (size, _) in digest.items()}
    wanted = [int(crc) for _, crcs in digest.values() for crc in crcs]
    blocks = list(zip(_blocks(sizes), wanted, strict=True))[part::parts]
  except (FileNotFoundError, ValueError, TypeError, AttributeError) as error:
    raise CorruptError(f"{folder / DIGEST} is missing or corrupt") from error
  for name, size in sizes.items():
    file = folder / name
    if not file.is_file():
      raise CorruptError(f"{file} is missing")
    if file.stat().st_size != size:
      raise CorruptError(f"{file} is {'truncated' if file.stat().st_size < size else 'too long'}")
  found = _crc32s(folder, [block for block, _ in blocks])
  for ((name, _), crc), other in zip(blocks, found, strict=True):
    if crc != other:
      raise CorruptError(f"{folder / name} is corrupt (its checksum differs)")


class _Checked:
  """Mixin before a handler; acts on the folder of one item."""

  def finalize(self, directory) -> None:
    super().finalize(directory)
    if jax.process_index() == 0:
      write_digest(pathlib.Path(directory))


class CheckedState(_Checked, ocp.StandardCheckpointHandler):
  """Any pytree of arrays, stored as they are: weights hardly compress, and trying takes longer than
  the disk.
  """

  def __init__(self):
    super().__init__()
    self._impl = ocp.PyTreeCheckpointHandler(use_compression=False)


class CheckedJson(_Checked, ocp.JsonCheckpointHandler):
  """A JSON object."""


def _blocks(sizes: dict[str, int]) -> list[tuple[str, int]]:
  """(name, first byte) of every block; an empty file has none."""
  return [(name, at) for name, size in sizes.items() for at in range(0, size, BLOCK)]


def _crc32s(folder: pathlib.Path, blocks: list[tuple[str, int]]) -> list[int]:
  def crc32(block: tuple[str, int]) -> int:
    name, at = block
    # What fits a processor's cache is summed before it leaves there.
    chunk = memoryview(bytearray(1 << 19))
    with (folder / name).open("rb", buffering=0) as stream:
      stream.seek(at)
      crc, left = 0, BLOCK
      while left and (count := stream.readinto(chunk[:left])):
        crc, left = zlib.crc32(chunk[:count], crc), left - count
      return crc

  with ThreadPoolExecutor(THREADS) as pool:
    return list(pool.map(crc32, blocks))
