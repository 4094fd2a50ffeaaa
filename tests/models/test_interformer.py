"""InterFormer against the equations of its paper."""

import functools

import numpy as np
from history_case import Case, N, maker
from numpy_layers import (
  event_tokens,
  gating,
  heads,
  personalised,
  sequence_summary,
  unit_summary,
  wukong_layer,
)
from sequence_oracle import layer_norm, self_attention

from gemjax import config as c
from gemjax.models.interformer import InterFormer

CONFIG = c.InterFormer(
  layers=2, cls=2, pma=1, recent=3, gating="tanh", rank=3, mlp=(7,), head=(6,),
  attention=c.Attention(heads=2, rope=50.0, time_buckets=33),
)  # fmt: skip


def oracle(config, w, x, histories):
  summed = functools.partial(unit_summary, kind=config.gating, cls=config.cls, mlp=True)
  lead = summed(x, w["exchanges"][0]["units"])
  sequences, ages = [], []
  for i, (units, age) in enumerate(histories):
    sequences.append(np.concatenate([lead, event_tokens(units, age, w["events"][i])]))
    ages.append([0] * config.cls + list(age))

  def exchange(w):
    parts = []
    for i, (s, age) in enumerate(zip(sequences, ages)):
      of = w.get("sequences", {}).get(i, {})
      counts = {"first": config.cls, "pma": config.pma, "recent": config.recent}
      parts.append(sequence_summary(s, age, of, config.attention, **counts))
    x_sum = summed(x, w["units"])
    return x_sum, gating(np.concatenate(parts), w["gate"], config.gating)

  for layer in range(config.layers):
    x_sum, s_sum = exchange(w["exchanges"][layer])
    # Both read the layer's inputs.
    x = wukong_layer(np.concatenate([x, s_sum]), w["interactions"][layer], N // 2)
    for i, of in w["archs"][layer].items():
      own = personalised(sequences[i], x_sum, of["personal"])
      attended = self_attention(own, ages[i], of["attention"], config.attention, causal=False)
      sequences[i] = layer_norm(sequences[i] + attended, of["norm"])
  return heads(np.concatenate(exchange(w["exchanges"][config.layers])), w["heads"])


def case(config, histories):
  make = maker(InterFormer, config, histories)
  return Case(make, lambda *args: oracle(config, *args), histories=histories)


def test_equations():
  case(CONFIG, 1).check_all()


def test_two_histories_without_the_parts_that_may_be_left_out():
  """Neither queries nor newest events leave the sequences; only the CLS tokens do."""
  attention = c.Attention(heads=1, qk_norm=True)
  config = c.InterFormer(
    layers=1, cls=1, pma=0, recent=0, gating="identity", rank=2, mlp=(), head=(),
    attention=attention,
  )  # fmt: skip
  case(config, 2).check_forward()
