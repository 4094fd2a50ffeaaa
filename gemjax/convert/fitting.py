"""Tensors of one config made to fit another: what is copied, cut, grown or initialised."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from gemjax.convert.tensors import Tensor, Tensors, cast, described

RowMap = Callable[[int, int], np.ndarray]  # (start, stop) -> row of the source of each, or -1.


class Fitted(NamedTuple):
  """A tensor of the result, and what was done for it, for people."""

  tensor: Tensor
  action: str


def fit(
  source: Tensors, wanted: Tensors, rows: dict[str, RowMap] | None = None
) -> dict[str, Fitted]:
  """Every tensor of `wanted`, with the values of `source` where it has them.

  A tensor of equal name and as many axes is copied as far as both reach: what is longer is cut,
  what is shorter keeps the values of `wanted` beyond. `rows` says for some which row of the
  source a row comes from, otherwise the one of its number. Sources of these that cannot take
  single rows are read whole, and held one at a time.
  """
  found, held = {}, {}

  def taken(name: str, rows: np.ndarray) -> np.ndarray:
    if take := source[name].take:
      return take(rows)
    if name not in held:
      held.clear()  # Before the next one is read.
      held[name] = source[name].whole()
    return held[name][rows]

  for name, fresh in wanted.items():
    old, which = source.get(name), (rows or {}).get(name)
    if old is None or len(old.shape) != len(fresh.shape):
      found[name] = Fitted(fresh, "initialised")
    elif old.shape == fresh.shape and which is None:
      action = "copied" if old.dtype == fresh.dtype else f"copied, {old.dtype} cast"
      found[name] = Fitted(cast(old, fresh.dtype), action)
    else:
      take = functools.partial(taken, name)
      found[name] = Fitted(_overlap(old, fresh, which, take), _described(old, fresh, which))
  return found


def table(fitted: dict[str, Fitted], left: list[str]) -> list[str]:
  """The lines that a person reads, equal neighbours of a kind apart."""
  width = max(map(len, fitted), default=0)
  lines = [f"{name:<{width}}  {described(f.tensor):<24} {f.action}" for name, f in fitted.items()]
  return lines + [f"{name:<{width}}  {'':<24} left out" for name in left]


def _overlap(
  old: Tensor, fresh: Tensor, which: RowMap | None, take: Callable[[np.ndarray], np.ndarray]
) -> Tensor:
  columns = tuple(slice(0, min(a, b)) for a, b in zip(old.shape[1:], fresh.shape[1:]))

  def read(start: int, stop: int) -> np.ndarray:
    array = np.array(fresh.read(start, stop))
    if which is None:
      known = slice(0, max(0, min(stop, old.shape[0]) - start))
      rows = old.read(start, start + known.stop)
    else:
      at = which(start, stop)
      known = np.flatnonzero(at >= 0)
      rows = take(at[known])
    array[(known, *columns)] = rows[(slice(None), *columns)].astype(array.dtype)
    return array

  return Tensor(fresh.shape, fresh.dtype, read)


def _described(old: Tensor, fresh: Tensor, which: RowMap | None) -> str:
  words = ["copied by value"] if which else ["copied"]
  for axis, (a, b) in enumerate(zip(old.shape, fresh.shape)):
    if a > b:
      words.append(f"axis {axis} cut from {a}")
    elif a < b:
      words.append(f"axis {axis} grown from {a}, the rest initialised")
  if old.dtype != fresh.dtype:
    words.append(f"{old.dtype} cast")
  return ", ".join(words)
