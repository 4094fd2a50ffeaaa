"""Wukong against a float64 transcription of the paper's equations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gemjax.config import Wukong as WukongConfig
from gemjax.layers import interaction
from gemjax.layers.dropout import example_keys
from gemjax.models.wukong import Wukong

B, D, T = 3, 4, 2


def build(config, units, seed=0, dtype="float32"):
  model = Wukong(config, units=units, dim=D, tasks=T, dtype=dtype, rngs=nnx.Rngs(seed))
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  # Biases and norms are born at 0 and 1: move them, or a test would not see them.
  keys = iter(jax.random.split(jax.random.key(seed), 100))
  params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape), params)
  return nnx.split(model)[0], params


def x_of(units, seed=1):
  return np.random.default_rng(seed).normal(size=(B, units, D)).astype(np.float32)


def layer_norm(x, p, config):
  mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  return (x - mean) / np.sqrt(var + config.norm_eps) * p["scale"] + p["bias"]


def mlp(x, p, eps=None):
  layers = [p["layers"][i] for i in range(len(p["layers"]))]
  for i, layer in enumerate(layers[:-1]):
    x = x @ layer["kernel"] + layer["bias"]
    if (norm := p.get("norms", {}).get(i)) and eps:
      x = (x - norm["mean"]) / np.sqrt(norm["variance"] + eps) * norm["scale"] + norm["bias"]
    x = np.maximum(x, 0)
  return x @ layers[-1]["kernel"] + layers[-1]["bias"]


def wukong_layer(x, p, config):
  """X_{i+1} = LN(concat(FMB(X), LCB(X)) + R(X)) for one example, (n, d) -> (nF + nL, d)."""
  n = len(x)
  if config.fm == "basic":
    fm = x @ x.T
  elif config.fm == "optimised":
    fm = x @ (x.T @ p["fm"]["y_NK"])
  else:
    compressed = p["fm"]["compress"]["kernel_NL"].T @ x
    fm = x @ (x.T @ mlp(compressed.reshape(-1), p["fm"]["mlp"]).reshape(n, config.rank))
  fmb = mlp(layer_norm(fm.reshape(-1), p["fm_norm"], config), p["mlp"])
  fmb = (np.maximum(fmb, 0) if config.fmb_relu else fmb).reshape(config.fmb_units, D)
  lcb = p["compress"]["kernel_NL"].T @ x
  residual = p["residual"]["kernel_NL"].T @ x if p.get("residual") else x
  if p.get("residual") and config.residual_bias:
    residual = residual + p["residual"]["bias_L"][:, None]
  return layer_norm(np.concatenate([fmb, lcb]) + residual, p["norm"], config)


def oracle(x_BND, params, config):
  params = jax.tree.map(lambda p: np.asarray(p, np.float64), params)
  logits = []
  for x in x_BND.astype(np.float64):
    if params.get("first"):
      x = wukong_layer(x, params["first"], config)
    depth = config.layers - bool(params.get("first"))
    for i in range(depth):
      x = wukong_layer(x, jax.tree.map(lambda p, i=i: p[i], params["layers"]), config)
    heads = params["heads"]["heads"]
    eps = config.norm_eps if config.head_norm == "batch" else None
    logits.append([mlp(x.reshape(-1), heads[t], eps)[0] for t in range(T)])
  return np.array(logits)


@pytest.mark.parametrize("fm", ["basic", "optimised", "attentive"])
@pytest.mark.parametrize(("layers", "units"), [(1, 6), (3, 6), (3, 5), (4, 5)])
def test_logits_equal_the_equations(fm, layers, units):
  config = WukongConfig(layers=layers, fmb_units=2, lcb_units=3, rank=3, fm=fm, mlp=(7,), head=(6,))
  graph, params = build(config, units)
  x = x_of(units)
  got = nnx.merge(graph, params)(jnp.asarray(x))
  np.testing.assert_allclose(got, oracle(x, params, config), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
  "option",
  [{"fmb_relu": True}, {"residual_bias": True}, {"head_norm": "batch"}, {"norm_eps": 0.5}],
)
def test_what_other_implementations_do_otherwise(option):
  """Each changes the logits as the equations with it say."""
  plain = WukongConfig(layers=3, fmb_units=2, lcb_units=3, rank=3, mlp=(7,), head=(6, 4))
  config = dataclasses.replace(plain, **option)
  graph, params = build(config, 6)
  x = x_of(6)
  want = oracle(x, params, config)
  np.testing.assert_allclose(nnx.merge(graph, params)(jnp.asarray(x)), want, rtol=2e-4, atol=2e-4)
  # LN takes a bias away again, which is the same in all places of a unit.
  seen = not config.residual_bias
  assert (np.abs(want - oracle(x, params, plain)).max() > 1e-2) == seen


@pytest.mark.parametrize("large", [0, interaction.LARGE])
@pytest.mark.parametrize("fm", ["basic", "optimised", "attentive"])
@pytest.mark.parametrize(("layers", "units"), [(3, 6), (2, 5)])
def test_gradients_equal_differences_of_the_equations(fm, layers, units, large, monkeypatch):
  """Of every array by itself, along a random direction, in float64; large arrays go another way."""
  monkeypatch.setattr(interaction, "LARGE", large)
  config = WukongConfig(layers=layers, fmb_units=2, lcb_units=3, rank=3, fm=fm, mlp=(7,), head=(6,))
  graph, params = build(config, units)
  weight_BT = np.random.default_rng(2).normal(size=(B, T))
  loss = lambda params, x: (nnx.merge(graph, params)(x) * weight_BT).sum()
  args = params, jnp.asarray(x_of(units))
  leaves, tree = jax.tree.flatten(jax.tree.map(np.float64, args))
  found = jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1)))(*args))
  exact = lambda leaves: (oracle(*tree.unflatten(leaves)[::-1], config) * weight_BT).sum()
  rng, step = np.random.default_rng(3), 1e-6
  for i, (leaf, gradient) in enumerate(zip(leaves, found, strict=True)):
    way = rng.normal(size=leaf.shape)
    ends = [exact([*leaves[:i], leaf + s * way, *leaves[i + 1 :]]) for s in (step, -step)]
    scale = np.linalg.norm(gradient) * np.linalg.norm(way)
    np.testing.assert_allclose(
      np.vdot(gradient, way), (ends[0] - ends[1]) / (2 * step), atol=1e-4 * scale
    )


def test_batch_norm_keeps_its_statistics():
  """They get no gradient; scale and bias, and all in front of them, do."""
  config = WukongConfig(layers=1, fmb_units=2, lcb_units=2, rank=2, head=(6,), head_norm="batch")
  graph, params = build(config, 4)
  grads = jax.grad(lambda p: nnx.merge(graph, p)(jnp.asarray(x_of(4))).sum())(params)
  norm = grads["heads"]["heads"][0]["norms"][0]
  assert not norm["mean"].any() and not norm["variance"].any()
  assert norm["scale"].any() and norm["bias"].any()
  assert grads["heads"]["heads"][0]["layers"][0]["kernel"].any()


def test_fmb_is_not_cut_by_a_relu():
  """A ReLU on the FMB's output is the known fault of open implementations."""
  config = WukongConfig(layers=1, fmb_units=2, lcb_units=2, rank=2, mlp=(8,), head=())
  graph, params = build(config, 4)
  one = jax.tree.map(lambda p: p[0], params["layers"])
  flat = np.random.default_rng(0).normal(size=(100, 8))
  assert (mlp(flat, jax.tree.map(np.asarray, one["mlp"])) < 0).mean() > 0.2
  got = nnx.merge(graph, params)(jnp.asarray(x_of(4)))
  np.testing.assert_allclose(got, oracle(x_of(4), params, config), rtol=2e-4, atol=2e-4)


def test_an_example_does_not_see_its_neighbours():
  graph, params = build(WukongConfig(layers=3), 9)
  x = x_of(9)
  model = nnx.merge(graph, params)
  whole = model(jnp.asarray(x))
  order = [2, 0, 1]
  np.testing.assert_allclose(model(jnp.asarray(x[order])), whole[jnp.array(order)], rtol=1e-5)
  changed = x.copy()
  changed[1] += 1
  np.testing.assert_array_equal(model(jnp.asarray(changed))[0], whole[0])


def test_weights_have_the_variance_of_their_fan_in():
  """The units' mixing matrices sum over n_in units, not over n_out."""
  config = WukongConfig(layers=1, fmb_units=300, lcb_units=200, rank=20, mlp=(8,))
  model = Wukong(config, units=100, dim=D, tasks=1, dtype="float32", rngs=nnx.Rngs(0))
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))["first"]
  for kernel in (
    params["compress"]["kernel_NL"],
    params["residual"]["kernel_NL"],
    params["fm"]["y_NK"],
  ):
    assert kernel.shape[0] == 100
    assert abs(float(kernel.var()) * 100 - 1) < 0.15


def test_the_program_does_not_grow_with_depth():
  def size(layers):
    config = WukongConfig(layers=layers, fmb_units=3, lcb_units=3, mlp=(8,))
    graph, params = build(config, 6)
    grad = jax.grad(lambda p, x: nnx.merge(graph, p)(x).sum())
    return len(jax.jit(grad).lower(params, jnp.asarray(x_of(6))).as_text().splitlines())

  assert size(16) <= size(8) + 5


def test_dropout_needs_a_key_and_follows_it():
  config = WukongConfig(layers=3, dropout=0.5)
  graph, params = build(config, 6)
  model, x = jax.jit(lambda x, key_B=None: nnx.merge(graph, params)(x, key_B)), x_of(6)
  keys = [None, *(example_keys(jax.random.key(seed), 0, B) for seed in (0, 1))]
  a, b, c = (model(x, key) for key in keys)
  np.testing.assert_array_equal(a, model(x))
  np.testing.assert_array_equal(b, model(x, keys[1]))
  assert np.all(a != b) and np.all(b != c)


def test_bfloat16_computation_keeps_float32_parameters_and_logits():
  config = dataclasses.replace(WukongConfig(), layers=3)
  graph, params = build(config, 6, dtype="bfloat16")
  assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  got = nnx.merge(graph, params)(jnp.asarray(x_of(6), jnp.bfloat16))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, oracle(x_of(6), params, config), rtol=0.1, atol=0.1)
