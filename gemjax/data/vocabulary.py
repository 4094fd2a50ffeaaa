"""Vocabularies and hashes: how the text of a category becomes a row of its table.

Both rest on one 64-bit hash of the UTF-8 bytes, the same on every machine and in every process.
Letters: B values, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
import polars as pl

from gemjax.features import RESERVED, UNKNOWN

_U = np.uint64


def mix(x: np.ndarray) -> np.ndarray:
  """The finaliser of splitmix64 (Steele et al. 2014) on uint64: every bit moves all."""
  x = np.atleast_1d(x) + _U(0x9E3779B97F4A7C15)  # A copy, changed in place from here on.
  x ^= x >> _U(30)
  x *= _U(0xBF58476D1CE4E5B9)
  x ^= x >> _U(27)
  x *= _U(0x94D049BB133111EB)
  x ^= x >> _U(31)
  return x


def hash_texts(texts: pl.Series, seed: int = 0) -> np.ndarray:
  """uint64 hash of every text (none may be null).

  h = mix(seed xor mix(n)) for n bytes; then h = mix(h xor w) for each 8 bytes w, read little
  endian, the last filled up with zeros.
  """
  array = texts.cast(pl.String).rechunk().to_arrow().cast("large_string")
  if not len(array):
    return np.zeros(0, np.uint64)
  _, offsets, data = array.buffers()
  offsets = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
  begin, end = int(offsets[0]), int(offsets[-1])
  padded = np.zeros(end - begin + 8, np.uint8)  # So that 8 bytes can be read from any byte.
  if end > begin:
    padded[:-8] = np.frombuffer(data, np.uint8)[begin:end]
  word_at = np.ndarray((len(padded) - 7,), "<u8", padded, strides=(1,))
  start_B, length_B = offsets[:-1] - begin, np.diff(offsets)
  h_B = mix(_U(seed % 2**64) ^ mix(length_B.astype(np.uint64)))
  long = np.flatnonzero(length_B)  # The texts that have bytes left.
  done = 0
  while len(long):
    word = word_at[start_B[long] + done]
    left = np.minimum(length_B[long] - done, 8).astype(np.uint64)
    h_B[long] = mix(h_B[long] ^ (word & (~_U(0) >> (_U(64) - _U(8) * left))))
    done += 8
    long = long[length_B[long] > done]
  return h_B


class Vocabulary:
  """Rows 2, 3, ... for the values of a list, in its order; row 1 for everything else.

  The values' hashes are kept sorted, with the place where each of 2^k equal parts of their range
  begins (20 to 28 bytes a value); hashes are uniform, so a look-up begins a step or two before its
  place. Two values of the list never meet (the seed is raised until they do not); a value outside
  it is taken for one of V inside with probability V / 2^64.
  """

  def __init__(self, values: list[str]):
    self.values = values
    self._seed = -1
    hash_V = np.zeros(0, np.uint64)
    while self._seed < 0 or len(np.unique(hash_V)) < len(values):
      self._seed += 1
      hash_V = hash_texts(pl.Series(values, dtype=pl.String), self._seed)
    order = np.argsort(hash_V)
    self._hashes = np.append(hash_V[order], ~_U(0))  # A stop behind the last one.
    kind = np.int32 if self.size <= 2**31 else np.int64
    self._rows = np.append(order + RESERVED, UNKNOWN).astype(kind)
    bits = max(len(values).bit_length() + 1, 1)
    self._shift = _U(64 - bits)
    parts = np.arange(2**bits, dtype=np.uint64) << self._shift
    self._starts = np.searchsorted(self._hashes[:-1], parts).astype(kind)

  @property
  def size(self) -> int:
    return len(self.values) + RESERVED

  def rows(self, texts: pl.Series) -> np.ndarray:
    """Row of every text (none may be null), int32 unless there are more than 2^31."""
    hash_B = hash_texts(texts, self._seed)
    place_B = self._starts[hash_B >> self._shift]
    behind = np.flatnonzero(self._hashes[place_B] < hash_B)
    while len(behind):
      place_B[behind] += 1
      behind = behind[self._hashes[place_B[behind]] < hash_B[behind]]
    return np.where(self._hashes[place_B] == hash_B, self._rows[place_B], UNKNOWN)


class Hash:
  """int64 row 2 + h mod (size - 2), with h = `hash_texts` under the seed."""

  def __init__(self, size: int, seed: int):
    self.size, self.seed = size, seed

  def rows(self, texts: pl.Series) -> np.ndarray:
    h_B = hash_texts(texts, self.seed)
    return (h_B % _U(self.size - RESERVED)).astype(np.int64) + RESERVED


class Counter:
  """Counts values in a stream; memory grows with the distinct ones, not with the stream."""

  def __init__(self):
    self._counts: list[pl.DataFrame] = []
    self._merged = 0

  def add(self, texts: pl.Series) -> None:
    self._counts.append(texts.alias("value").drop_nulls().value_counts())
    if sum(map(len, self._counts)) > 2 * self._merged + 1_000_000:
      self._merge()

  def values(self, *, min_count: int, limit: int) -> list[str]:
    """Values seen at least `min_count` times, the most frequent first, ties by value."""
    if not self._counts:
      return []
    kept = self._merge().filter(pl.col("count") >= min_count)
    kept = kept.sort(["count", "value"], descending=[True, False])
    return (kept.head(limit) if limit else kept)["value"].to_list()

  def _merge(self) -> pl.DataFrame:
    whole = pl.concat(self._counts).group_by("value").agg(pl.col("count").sum())
    self._counts, self._merged = [whole], len(whole)
    return whole


def digest(vocabularies: dict[str, list[str]]) -> str:
  """16 hex digits that differ if any vocabulary does."""
  text = json.dumps(vocabularies, sort_keys=True, ensure_ascii=False)
  return hashlib.sha256(text.encode()).hexdigest()[:16]
