"""The transformer block against its equations; dropout of both parts."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from sequence_case import DIM, Case, events
from sequence_oracle import transformer

from gemjax.config import Attention
from gemjax.layers import tokens as tokens_lib
from gemjax.layers.transformer import TransformerBlock

CONFIG = Attention(heads=2, position_buckets=6)


def block(dropout=0.0):
  return TransformerBlock(
    CONFIG, DIM, causal=True, hidden=12, dropout=dropout, dtype="float32", rngs=nnx.Rngs(4)
  )


def test_equations():
  case = Case(
    block(),
    lambda module, tokens, _: module(tokens),
    lambda w, x, age, _: transformer(x, age, w, CONFIG, causal=True),
  )
  case.check_values()
  case.check_gradients()
  case.check_order()
  case.check_others()
  case.check_later()
  case.check_none()


def test_dropout_of_the_attended_values():
  """Of 128 equal examples, each with a key, every value is dropped or 1 / 0.7 of the plain one."""
  x_ED, age_E = (x[:9] for x in events())
  layer = block(dropout=0.3)
  layer.mlp.layers[-1].kernel[...] *= 0  # Leaves the attended values.
  lengths_B = jnp.full(128, 9, jnp.int32)
  tokens = tokens_lib.of_lengths(np.tile(x_ED, (128, 1)), lengths_B, np.tile(age_E, 128))
  y_ED = nnx.jit(layer)(tokens, jax.random.split(jax.random.key(2), 128))
  added = np.asarray(y_ED).reshape(128, 9, DIM) - x_ED
  w = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer)))
  plain = transformer(x_ED, age_E, w, CONFIG, causal=True) - x_ED
  kept = added != 0
  np.testing.assert_allclose(added, kept * plain / 0.7, rtol=1e-3, atol=1e-5)
  # 9,216 coins: standard deviation 0.005.
  assert abs(kept.mean() - 0.7) < 0.02
  # 72 coins an example: if events shared theirs, the variance of their sum were 9 times as large.
  assert abs(kept.sum((1, 2)).var() / (72 * 0.21) - 1) < 0.5
