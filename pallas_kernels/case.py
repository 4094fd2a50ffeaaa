"""What an op shows of itself: programs to compile for GPUs, and lengths to be judged on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Case:
  """One program of an op at one named shape, for the report of what compilers make of it."""

  op: str
  implementation: Literal["triton", "mosaic"]
  direction: Literal["forward", "backward"]
  shape: str
  fn: Callable[..., Any]
  args: tuple[Any, ...]  # Pytrees of jax.ShapeDtypeStruct.
  # Our kernels in the program, by the name given to pallas_call: whether it multiplies matrices.
  kernels: Mapping[str, bool]


def zipf_lengths(total: int, segments: int, seed: int) -> np.ndarray:
  """Lengths whose ranks follow Zipf's law, of about `total` events, shuffled."""
  length_S = 1 / np.arange(1, segments + 1)
  length_S = np.maximum(1, np.round(length_S * total / length_S.sum())).astype(np.int32)
  return np.random.default_rng(seed).permutation(length_S)


# Lengths of segments on which every implementation of every jagged op is judged.
LENGTHS: dict[str, np.ndarray] = {
  "zero_segments": np.zeros((0,), np.int32),
  "all_empty": np.zeros((5,), np.int32),
  "one_event": np.array([1], np.int32),
  "empty_among": np.array([0, 0, 7, 0, 130, 0, 0, 3, 0], np.int32),
  "around_block": np.array([63, 64, 65, 1, 127, 128, 129, 31, 32, 33, 15, 16, 17], np.int32),
  "one_long": np.array([0] * 5 + [16_384] + [0] * 6, np.int32),
  "many_short": np.random.default_rng(0).integers(0, 7, 4_096).astype(np.int32),
  "zipf": zipf_lengths(total=2_000, segments=20, seed=1),  # Mean 100, 1 of 556.
}


def offsets(length_S: np.ndarray, start: int = 0) -> np.ndarray:
  """offsets_S1 int32 of segments that lie side by side from row `start` on."""
  return np.concatenate([[start], start + np.cumsum(length_S)]).astype(np.int32)
