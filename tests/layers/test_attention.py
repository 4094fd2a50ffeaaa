"""Attention over events against its equations, masks and all."""

import dataclasses

import numpy as np
import pytest
from flax import nnx
from sequence_case import DIM, LENGTHS, Case
from sequence_oracle import cross_attention, self_attention

from gemjax.config import Attention
from gemjax.layers.attention import CrossAttention, Pma, SelfAttention

ALL = Attention(heads=2, rope=100.0, qk_norm=True, position_buckets=14, time_buckets=33)
SELF = {
  "window": (dataclasses.replace(ALL, window=4), False),
  "block": (Attention(heads=4, block=4, rope=100.0), True),
}


@pytest.mark.parametrize("name", SELF)
def test_self_attention(name):
  config, causal = SELF[name]
  case = Case(
    SelfAttention(config, DIM, causal=causal, dtype="float32", rngs=nnx.Rngs(1)),
    lambda module, tokens, _: module(tokens),
    lambda w, x, age, _: self_attention(x, age, w, config, causal),
  )
  case.check_values()
  case.check_gradients()
  case.check_order()
  case.check_others()
  assert not case.check_none().any()
  if causal:
    case.check_later()


def test_cross_attention():
  q_BMD = np.random.default_rng(5).normal(size=(len(LENGTHS), 3, DIM)).astype(np.float32)
  case = Case(
    CrossAttention(ALL, DIM, dtype="float32", rngs=nnx.Rngs(2)),
    lambda module, tokens, q_BMD: module(q_BMD, tokens),
    lambda w, x, age, q_MD: cross_attention(q_MD, x, age, w, ALL),
    extra=q_BMD,
  )
  case.check_values()
  case.check_gradients()
  case.check_order()
  case.check_others()
  assert not case.check_none().any()
  y, _, _ = case.run()
  z, _, _ = case.run(extra=q_BMD[:, ::-1])  # Queries know no order among themselves.
  np.testing.assert_allclose(y, z[:, ::-1], rtol=1e-6, atol=1e-6)


def test_pma():
  case = Case(
    Pma(ALL, DIM, 3, dtype="float32", rngs=nnx.Rngs(3)),
    lambda module, tokens, _: module(tokens),
    lambda w, x, age, _: cross_attention(w["seeds_MD"], x, age, w["attention"], ALL),
  )
  case.check_values()
  case.check_gradients()
  case.check_order()
  case.check_others()
  assert not case.check_none().any()
  y, _, _ = case.run()
  assert not y[[1, 5]].any() and y[[0, 2, 3, 4]].all()


def test_a_width_that_heads_do_not_share():
  with pytest.raises(ValueError, match="width 10 must divide by the 4 heads"):
    SelfAttention(Attention(heads=4), 10, causal=True, dtype="float32", rngs=nnx.Rngs(0))
