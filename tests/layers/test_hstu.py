"""HSTU's block against the equations of its paper; dropout by the event."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from sequence_case import DIM, LENGTHS, Case, events, split
from sequence_oracle import hstu

from gemjax.config import Attention
from gemjax.layers import tokens as tokens_lib
from gemjax.layers.hstu import HstuBlock

CONFIG = Attention(heads=2, position_buckets=8, time_buckets=33, qk_norm=True, rope=50.0)
PLAIN = Attention(heads=1)
NORM = 9.0


def block(config, dropout=0.0, dtype="float32"):
  return HstuBlock(config, DIM, dropout=dropout, norm=NORM, dtype=dtype, rngs=nnx.Rngs(4))


def test_equations():
  case = Case(
    block(CONFIG),
    lambda module, tokens, _: module(tokens),
    lambda w, x, age, _: hstu(x, age, w, CONFIG, NORM),
  )
  case.check_values()
  case.check_gradients()
  case.check_order()
  case.check_others()
  case.check_later()
  case.check_none()


def test_dropout_is_that_of_the_example_wherever_it_lies():
  x_ED, age_E = events()
  layer = nnx.jit(block(PLAIN, dropout=0.4))
  keys = jax.random.split(jax.random.key(1), 12)
  run = lambda x, n, age, keys: np.asarray(layer(tokens_lib.of_lengths(x, n, age), keys))
  y = run(x_ED, jnp.array(LENGTHS), age_E, keys[:6])
  # The example of 9 events, with its key, in another slot of another batch.
  moved = np.roll(x_ED, -2, axis=0), jnp.array([1, 9, 0, 0, 0, 2]), np.roll(age_E, -2)
  z = run(*moved, keys[jnp.array([5, 2, 1, 0, 3, 4])])
  np.testing.assert_allclose(y[3:12], z[1:10], rtol=1e-5, atol=1e-6)
  other = run(x_ED, jnp.array(LENGTHS), age_E, keys[6:])
  assert (abs(y - other)[: sum(LENGTHS)].max(1) > 1e-4).all()


def test_bfloat16_is_near():
  x_ED, age_E = events()
  layer = block(PLAIN, dtype="bfloat16")
  tokens = tokens_lib.of_lengths(jnp.asarray(x_ED, jnp.bfloat16), jnp.array(LENGTHS), age_E)
  y_ED = nnx.jit(layer)(tokens)
  assert y_ED.dtype == jnp.bfloat16
  w = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer)))
  assert all(x.dtype == np.float32 for x in jax.tree.leaves(w))
  wanted = [hstu(x, age, w, PLAIN, NORM) for x, age in zip(split(x_ED), split(age_E))]
  np.testing.assert_allclose(np.asarray(y_ED, float)[:18], np.concatenate(wanted), atol=0.06)
