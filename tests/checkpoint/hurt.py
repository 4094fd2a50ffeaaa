"""Copies of a folder, each with one file hurt."""

import random
import shutil


def copies(folder, files, copy):
  """Every one of `files` flipped in a bit, then truncated, then deleted, in `copy` of the folder,
  which is made anew for each: yields the path of what is hurt there.
  """
  rng = random.Random(0)
  for file in files:
    for harm in ("flip", "truncate", "delete"):
      shutil.copytree(folder, copy)
      target = copy / file.relative_to(folder)
      content = bytearray(target.read_bytes())
      if harm == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
      target.write_bytes(content[: len(content) // 2] if harm == "truncate" else content)
      if harm == "delete":
        target.unlink()
      yield target
      shutil.rmtree(copy)
