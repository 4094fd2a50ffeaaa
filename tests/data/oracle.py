"""What preparation must find, with dicts and Python's own integers and floats."""

import collections
import os
import pathlib
import struct

import pytest

from gemjax.data.block_reader import BlockReader
from gemjax.data.prepared import concatenate


def columns(data, split):
  reader = BlockReader(data, split)
  return concatenate([reader.read(b) for b in range(len(reader.sizes))])


def mix(x):
  mask = 2**64 - 1
  x = (x + 0x9E3779B97F4A7C15) & mask
  x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
  x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
  return x ^ (x >> 31)


def hash_text(text, seed=0):
  data = text.encode()
  h = mix((seed % 2**64) ^ mix(len(data)))
  for i in range(0, len(data), 8):
    h = mix(h ^ struct.unpack("<Q", data[i : i + 8].ljust(8, b"\0"))[0])
  return h


def vocabulary(values, min_count=1):
  counts = collections.Counter(v for v in values if v)
  kept = sorted((v for v in counts if counts[v] >= min_count), key=lambda v: (-counts[v], v))
  return {v: i + 2 for i, v in enumerate(kept)}


def row(table, value):
  return table.get(value, 1) if value else 0


PICKED = [0, 1, 77, 1234, 9001]  # Examples that are looked at one by one.
REAL = pathlib.Path(
  os.environ.get("GEMJAX_DATA", pathlib.Path(__file__).parents[3] / "shared/data")
)


def real(name):
  path = REAL / name
  if not path.exists():
    pytest.skip(f"{path} is absent; set GEMJAX_DATA to the folder that holds {name}")
  return path
