"""The personalised feed-forward layer against InterFormer's equation."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from sequence_case import DIM, LENGTHS, Case, events

from gemjax.layers import tokens as tokens_lib
from gemjax.layers.personalised import PersonalisedFfn


def test_equation():
  """S_b W_b, W_b[i, j] = sum_k X_sum_b[k] W_0[k, i, j]: a matrix an example, no gate."""
  case = Case(
    PersonalisedFfn(5, DIM, dtype="float32", rngs=nnx.Rngs(3)),
    lambda module, tokens, x_sum_BI: module(x_sum_BI, tokens),
    lambda w, x, age, x_sum: x @ np.einsum("k,kij->ij", x_sum, w["kernel"].reshape(5, DIM, DIM)),
    extra=np.random.default_rng(6).normal(size=(len(LENGTHS), 5)).astype(np.float32),
  )
  case.check_values()
  case.check_gradients()
  case.check_order()
  case.check_others()
  assert not case.check_none().any()


def test_it_is_born_to_keep_the_variance():
  rng = np.random.default_rng(0)
  _, age_E = events(dim=32)
  ffn = nnx.jit(PersonalisedFfn(64, 32, dtype="float32", rngs=nnx.Rngs(0)))
  y = []
  for _ in range(20):
    x_sum_BI = rng.normal(size=(len(LENGTHS), 64)).astype(np.float32)
    x_ED = rng.normal(size=(24, 32)).astype(np.float32)
    tokens = tokens_lib.of_lengths(x_ED, jnp.array(LENGTHS), age_E)
    y.append(np.asarray(ffn(x_sum_BI, tokens))[:18])
  # 80 examples with events have |X_sum|^2 / 64 in common: 1, standard deviation 0.18 of one.
  assert abs(np.var(np.concatenate(y)) - 1) < 0.12
