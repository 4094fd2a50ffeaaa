"""The units' input and the baselines against their formulas."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemjax import config as c
from gemjax.models import Ranker

B, N, D, F = 5, 4, 3, 2
rng = np.random.default_rng(0)
UNITS = rng.normal(size=(B, N, D)).astype(np.float32)
SMALL = rng.normal(size=(B, 3, 2)).astype(np.float32)
DENSE = rng.normal(size=(B, F)).astype(np.float32)


def ranker(model, *, units=N, small=0, dense=0, tasks=1, dim=D, **embedding):
  config = c.Config(name="x", model=model, embedding=c.Embedding(dim=dim, **embedding))
  return Ranker(config, units=units, small=small, dense=dense, tasks=tasks, rngs=nnx.Rngs(0))


def call(model, small=SMALL[:, :0], dense=DENSE[:, :0], key=None):
  return np.asarray(model(jnp.asarray(UNITS), jnp.asarray(small), jnp.asarray(dense), key))


def numpy_mlp(x, mlp):
  for i, layer in enumerate(mlp.layers):
    x = x @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...], np.float64)
    if i < len(mlp.layers) - 1:
      x = np.maximum(x, 0)
  return x


def test_input_units_are_dense_then_embeddings_then_small_groups():
  model = ranker(
    c.Mlp(), small=3, dense=F, small_dim=2, small_group=2, dense_units=2, dense_mlp=(6,)
  )
  x = np.asarray(model.inputs(jnp.asarray(UNITS), jnp.asarray(SMALL), jnp.asarray(DENSE)))
  assert x.shape == (B, 2 + N + 1 + 1, D) and model.inputs.units == 8
  dense = numpy_mlp(DENSE, model.inputs.dense)
  np.testing.assert_allclose(x[:, :2].reshape(B, -1), dense, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(x[:, 2:6], UNITS)
  first = numpy_mlp(SMALL[:, :2].reshape(B, -1), model.inputs.small[0])
  np.testing.assert_allclose(x[:, 6], first, rtol=1e-4, atol=1e-5)
  last = numpy_mlp(SMALL[:, 2], model.inputs.small[1])
  np.testing.assert_allclose(x[:, 7], last, rtol=1e-4, atol=1e-5)


def test_logistic_regression_sums_weights():
  model = ranker(c.Logistic(), dim=1, units=N)
  units = UNITS[..., :1]
  got = model(jnp.asarray(units), jnp.asarray(SMALL[:, :0]), jnp.asarray(DENSE[:, :0]))
  np.testing.assert_allclose(got[:, 0], units.sum((1, 2)), rtol=1e-5)


def test_linear_models_are_linear_in_their_dense_features():
  model = ranker(c.Logistic(), dim=1, dense=F)
  call_with = lambda dense: np.asarray(
    model(jnp.asarray(UNITS[..., :1]), jnp.asarray(SMALL[:, :0]), jnp.asarray(dense))
  )
  zero, one, three = (call_with(k * DENSE) for k in (0, 1, 3))
  np.testing.assert_allclose(three - zero, 3 * (one - zero), rtol=1e-4, atol=1e-5)
  assert np.abs(one - zero).max() > 0.01


def test_fm_is_the_sum_over_all_pairs():
  w, v = UNITS[..., 0].astype(np.float64), UNITS[..., 1:].astype(np.float64)
  pairs = sum((v[:, i] * v[:, j]).sum(1) for i in range(N) for j in range(i + 1, N))
  np.testing.assert_allclose(call(ranker(c.Fm()))[:, 0], w.sum(1) + pairs, rtol=1e-4, atol=1e-5)


def test_dlrm_sees_every_pair_once():
  model = ranker(c.Dlrm(head=(7,)))
  dots = [(UNITS[:, i] * UNITS[:, j]).sum(1) for i in range(N) for j in range(i + 1, N)]
  x = np.concatenate([UNITS.reshape(B, -1), np.stack(dots, 1)], 1).astype(np.float64)
  expected = numpy_mlp(x, model.model.heads.heads[0])
  np.testing.assert_allclose(call(model), expected, rtol=1e-4, atol=1e-5)


def test_dcnv2_crosses_with_the_input_at_every_layer():
  model = ranker(c.Dcnv2(layers=2, mlp=(6, 5)))
  x0 = UNITS.reshape(B, -1).astype(np.float64)
  x = x0
  for layer in model.model.cross:
    x = x0 * (x @ np.asarray(layer.kernel[...], np.float64)) + x
  deep = np.maximum(numpy_mlp(x0, model.model.deep), 0)
  expected = numpy_mlp(np.concatenate([x, deep], 1), model.model.heads.heads[0])
  np.testing.assert_allclose(call(model), expected, rtol=1e-4, atol=1e-5)


def test_mlp_reads_the_concatenated_units():
  model = ranker(c.Mlp(head=(7, 6)), tasks=2)
  x = UNITS.reshape(B, -1).astype(np.float64)
  expected = np.concatenate([numpy_mlp(x, head) for head in model.model.heads.heads], 1)
  np.testing.assert_allclose(call(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model", [c.Logistic(), c.Fm()])
def test_linear_models_say_which_width_they_need(model):
  with pytest.raises(c.ConfigError, match=r"config\.embedding\.dim is 3"):
    ranker(model, tasks=4)
