"""What GEM's blocks in front say of the next event, and what they have not seen."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from flax import nnx
from history_case import FAST, LENGTHS, SPECS, D, ends, make_histories
from numpy_layers import event_tokens
from sequence_oracle import layer_norm, linear, transformer
from test_gem import CONFIG, case

from gemjax.layers import attention
from gemjax.layers.events import EventRows
from gemjax.layers.next_event import Next, NextEvents

AHEAD = dataclasses.replace(CONFIG, next_event=0.5)


@pytest.fixture
def quickly_compiled(monkeypatch):
  """Attention by its formula, whose program is small; the others are compared elsewhere."""
  formula = functools.partial(attention.jagged_attention, implementation="reference")
  monkeypatch.setattr(attention, "jagged_attention", formula)


def followed(case, histories):
  """What the model says of the events behind each, a history."""

  @functools.partial(jax.jit, compiler_options=FAST)
  def run(params, x_BND, rows):
    model = nnx.merge(case.graph, params)
    model(x_BND, rows, None, **case.more)
    return jax.tree.leaves(nnx.pop(model, Next), is_leaf=lambda x: isinstance(x, NextEvents))

  rows = {n: EventRows(*histories[n], np.array(LENGTHS[n], np.int32)) for n in histories}
  found = run(case.params, case.x_BND, rows)
  return jax.tree.map(np.asarray, dict(zip(histories, found, strict=True)))


def test_a_block_in_front_tells_the_next_event(quickly_compiled):
  ahead = case(AHEAD, 2)
  ahead.check_forward()
  ahead.check_order()
  found = followed(ahead, ahead.histories)
  params = jax.tree.map(np.float64, ahead.params)
  for i, spec in enumerate(SPECS):
    of, (units, age) = found[spec.name], ahead.histories[spec.name]
    item = units[:, 0]  # Both histories' first column is the candidate's.
    np.testing.assert_array_equal(of.item_ED, item)
    for b, length in enumerate(LENGTHS[spec.name]):
      start, end = ends(spec.name)[b : b + 2]
      assert of.length_B[b] == length
      np.testing.assert_array_equal(of.newest_BD[b], item[end - 1] if length else np.zeros(D))
      np.testing.assert_array_equal(of.followed_E[start:end], np.arange(length) < length - 1)
      s = event_tokens(units[start:end], age[start:end], params["events"][i])
      s = transformer(s, age[start:end], params["fronts"][i], CONFIG.fine, causal=True)
      w = params["next"][i]
      asks = linear(layer_norm(s, w["norm"]), w["ask"]) * D**0.5
      np.testing.assert_allclose(of.asks_ED[start:end], asks, rtol=1e-4, atol=1e-4)
    assert not of.followed_E[end:].any()


def test_what_tells_the_next_event_has_not_seen_it(quickly_compiled):
  """Every event but the first of each history changes, and the examples themselves."""
  ahead = case(AHEAD, 2)
  before = followed(ahead, ahead.histories)
  other, changed = make_histories(seed=1), {}
  for name, (units, age) in ahead.histories.items():
    first = np.isin(np.arange(len(age)), ends(name)[:-1])
    changed[name] = np.where(first[:, None, None], units, other[name][0]), age
  ahead.x_BND = ahead.x_BND[::-1]
  after = followed(ahead, changed)
  for name in before:
    starts = ends(name)[:-1][np.array(LENGTHS[name]) > 0]
    same = (before[name].asks_ED == after[name].asks_ED).all(1)
    assert same[starts].all() and not same[starts[0] + 1]
