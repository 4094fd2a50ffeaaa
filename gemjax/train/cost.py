"""What events cost: it decides which examples share a batch, and completes the count of FLOPs.

Letters: B examples, L events or tokens of one, v keys that one sees, d width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from gemjax import config as config_lib


class _Reader(NamedTuple):
  """How one branch of a model reads a history."""

  attention: config_lib.Attention
  stride: int  # Events a token.
  layers: int
  queries: int  # That attend over all tokens, summed over the layers.
  personal: bool  # Whether each layer multiplies by the example's own matrix.
  more: int = 0  # Tokens beside the events: CLS, or the candidate.


def example_cost(config: config_lib.Config, lengths: Mapping[str, np.ndarray]) -> np.ndarray:
  """cost_B, about the matrix FLOPs of a forward pass over an example's events.

      layers (24 d^2 + 4 d v) L + 4 d queries L      over all branches of all histories

  and 8 d interest L of GEM's interest, with about 12 d^2 weights in a layer's projections, feed-
  forward part and exchange, and v = min(L, block, window).
  A model without attention reads each event once.

  Args:
    config: Of the experiment.
    lengths: History -> length_B.
  """
  d, cost_B = config.embedding.dim, 0.0
  for length_B in lengths.values():
    cost_B = cost_B + length_B * (1 + 8 * d * getattr(config.model, "interest", 0))
    for reader in _readers(config.model):
      tokens_B, keys_B = _seen(reader, length_B)
      a_layer_B = (24 * d * d + 4 * d * keys_B) * tokens_B
      cost_B = cost_B + reader.layers * a_layer_B + 4 * d * reader.queries * tokens_B
  return cost_B


def jagged_flops(config: config_lib.Config, lengths: Mapping[str, np.ndarray]) -> float:
  """Matrix FLOPs of a training step inside jagged ops, whose loops end where the events do.

  Products of attention, over the keys that are seen, and of personalised matrices; three times
  those of the forward pass, as for every product.
  """
  d, total = config.embedding.dim, 0.0
  for length_B in lengths.values():
    for reader in _readers(config.model):
      tokens_B = np.ceil(length_B / reader.stride) + reader.more
      causal = not isinstance(config.model, config_lib.InterFormer)
      a_layer_B = 4 * d * _pairs(reader.attention, tokens_B, causal)
      a_layer_B = a_layer_B + 2 * d * d * reader.personal * tokens_B
      total += float((reader.layers * a_layer_B + 4 * d * reader.queries * tokens_B).sum())
  return 3 * total


def _pairs(attention: config_lib.Attention, tokens_B: np.ndarray, causal: bool) -> np.ndarray:
  """(query, key) pairs that see each other; exact but for both a block and a window."""
  whole = lambda n_B: n_B * (n_B + 1) / 2 if causal else n_B * n_B
  if attention.block:
    blocks_B, rest_B = np.divmod(tokens_B, attention.block)
    return blocks_B * whole(attention.block) + whole(rest_B)
  if not attention.window:
    return whole(tokens_B)
  hidden_B = np.maximum(tokens_B - attention.window, 0)  # Keys that the farthest query misses.
  return whole(tokens_B) - hidden_B * (hidden_B + 1) / (2 if causal else 1)


def _seen(reader: _Reader, length_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(tokens_B, keys_B)."""
  tokens_B = np.ceil(length_B / reader.stride)
  near = [n for n in (reader.attention.block, reader.attention.window) if n]
  return tokens_B, np.minimum(tokens_B, min(near)) if near else tokens_B


def _readers(model: config_lib.Model) -> Iterator[_Reader]:
  match model:
    case config_lib.Sasrec() | config_lib.Hstu():
      yield _Reader(model.attention, 1, model.layers, 0, False, more=1)
    case config_lib.InterFormer():
      queries = (model.layers + 1) * model.pma
      yield _Reader(model.attention, 1, model.layers, queries, True, more=model.cls)
    case config_lib.Gem():
      times = 1 + model.layers * model.exchange
      queries = times * (model.pma + (model.cls if model.cross else 0) + model.target)
      personal = model.exchange and model.personalised
      if model.next_event:
        yield _Reader(model.fine, 1, 1, 0, False)
      for stride in model.strides:
        attention = model.fine if stride == 1 else model.coarse
        yield _Reader(attention, stride, model.layers, queries, personal)
