"""What all processes of a run have found, so that they decide alike."""

from __future__ import annotations

import jax
import numpy as np
from jax.experimental import multihost_utils

LONGEST = 1000  # Bytes of a text.


def texts_of_all(text: str) -> list[str]:
  """The text of every process, cut to LONGEST; all must call it."""
  if jax.process_count() == 1:
    return [text]
  row = np.zeros(LONGEST, np.uint8)
  encoded = text.encode()[:LONGEST]
  row[: len(encoded)] = np.frombuffer(encoded, np.uint8)
  rows = multihost_utils.process_allgather(row)
  return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


def arrays_of_all(x: np.ndarray) -> np.ndarray:
  """The arrays of all processes, which have one shape, stacked; all must call it."""
  return x[None] if jax.process_count() == 1 else multihost_utils.process_allgather(x)


def first_of_all(blob: bytes) -> bytes:
  """What the first process has that has any bytes; all must call it."""
  if jax.process_count() == 1:
    return blob
  sizes = arrays_of_all(np.array(len(blob)))
  giver = int((sizes > 0).argmax())
  if not sizes[giver]:
    return b""
  row = np.zeros(sizes[giver], np.uint8)
  if here := jax.process_index() == giver:
    row[:] = np.frombuffer(blob, np.uint8)
  return bytes(multihost_utils.broadcast_one_to_all(row, is_source=here))
