"""Layers whose backward pass keeps less: same outputs, gradients near or equal, fewer bytes."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from gemjax import config as c
from gemjax.layers.dropout import dropout, example_keys
from gemjax.layers.norm import LayerNorm
from gemjax.layers.saved import Keeping, bytes_saved, run, saved, scan
from gemjax.models.wukong import Wukong, WukongLayer

B, D, N = 256, 16, 32
BOTH = pytest.mark.parametrize("float8, recompute", [(True, False), (False, True)])


def wukong_layer(dtype):
  config = c.Wukong(fmb_units=16, lcb_units=16, rank=16, mlp=(128, 128), dropout=0.1)
  graph, weights = nnx.split(WukongLayer(config, N, D, dtype, nnx.Rngs(0)))
  inputs = jax.random.normal(jax.random.key(1), (B, D, N)).astype(dtype)
  keys = example_keys(jax.random.key(2), 0, B)
  return (lambda weights, x, key_B: nnx.merge(graph, weights)(x, key_B)), weights, inputs, keys


def gradients(layer, weights, x, *rest):
  def loss(weights, x):
    return jnp.sum(jnp.sin(layer(weights, x, *rest).astype(jnp.float32)))

  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(weights, x)


def distance(found, exact):
  """The largest ||a - b|| / ||b|| over all arrays."""
  norm = lambda a: float(jnp.linalg.norm(a.astype(jnp.float32).ravel()))
  pairs = zip(jax.tree.leaves(found), jax.tree.leaves(exact), strict=True)
  return max(norm(a - b) / norm(b) for a, b in pairs)


@BOTH
def test_outputs_are_equal_and_gradients_near(float8, recompute):
  layer, weights, x, keys = wukong_layer("float32")
  less = saved(layer, float8=float8, recompute=recompute)
  exact_loss, exact = gradients(layer, weights, x, keys)
  loss, found = gradients(less, weights, x, keys)
  assert float(loss) == pytest.approx(float(exact_loss), abs=1e-2)  # A sum of 131,072 sines.
  # Rounding to 3 bits of mantissa is wrong by 1/16 at most, by 1/40 on the average.
  assert distance(found, exact) < (0.05 if float8 else 1e-5)
  assert (distance(found, exact) > 0.002) == float8  # It did round.


@pytest.mark.parametrize("dtype, share", [("bfloat16", 0.44), ("float32", 0.22)])
def test_float8_keeps_less_than_half_of_bfloat16_and_a_quarter_of_float32(dtype, share):
  """Of a layer as wide as those that need it, whose norm's output is made again."""
  examples, width, units = 8192, 160, 192
  config = c.Wukong(fmb_units=96, lcb_units=96, rank=96, mlp=(4096, 4096))
  layer = lambda: WukongLayer(config, units, width, dtype, nnx.Rngs(0))
  graph, weights = nnx.split(nnx.eval_shape(layer))
  x = jax.ShapeDtypeStruct((examples, width, units), dtype)

  def kept(**how):
    less = saved(lambda weights, x: nnx.merge(graph, weights)(x), **how)
    # A layer reads what the one before has made, which is kept as well.
    return bytes_saved(lambda weights, x: less(weights, x * 2), weights, x)

  whole = kept(float8=False, recompute=False)
  assert kept(float8=True, recompute=False) <= share * whole
  assert kept(float8=False, recompute=True) <= 0.3 * whole


@pytest.mark.parametrize(
  "dtype, unroll",
  [("float32", 4), ("bfloat16", 4), pytest.param("float32", 0, marks=pytest.mark.slow)],
)
def test_a_program_holds_no_wide_array_from_the_forward_to_the_backward_pass(dtype, unroll):
  """XLA for CPUs would come back from 8 bits as soon as it can: in the forward pass."""
  config = c.Wukong(layers=4, fmb_units=16, lcb_units=16, rank=16, mlp=(512,), head=(32,))
  x = jax.random.normal(jax.random.key(0), (512, N, 64)).astype(dtype)
  temporaries = []
  for float8 in (False, True):
    how = {"units": N, "dim": 64, "tasks": 1, "dtype": dtype, "rngs": nnx.Rngs(0)}
    keeping = Keeping(float8=float8, unroll=unroll, early_sums=bool(unroll))
    graph, weights = nnx.split(Wukong(config, **how, keeping=keeping))
    loss = lambda weights, x, graph=graph: nnx.merge(graph, weights)(x).mean()
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(weights, x).compile()
    temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
  wide, narrow = temporaries
  assert narrow < 0.75 * wide, temporaries


def test_weights_are_not_rounded():
  w = jax.random.normal(jax.random.key(0), (64, 48))
  x = jax.random.normal(jax.random.key(1), (128, 64))
  layer = lambda w, x: (x @ jnp.tanh(w)) ** 2 / 2
  exact = jax.vjp(layer, w, x)[1](jnp.ones((128, 48)))
  found = jax.vjp(saved(layer, float8=True, recompute=False), w, x)[1](jnp.ones((128, 48)))
  packed = saved(lambda w, x: x @ jnp.tanh(w), float8=True, recompute=False)
  of_w, of_x = jax.vjp(packed, w, x)[1](jnp.ones((128, 48)))
  exact_w, exact_x = jax.vjp(lambda w, x: x @ jnp.tanh(w), w, x)[1](jnp.ones((128, 48)))
  assert (of_x == exact_x).all() and not (of_w == exact_w).all()
  assert 0 < distance(found, exact) < 0.05


@pytest.mark.parametrize("mean", [0, 3, 30])
def test_a_norm_keeps_what_is_left_beside_its_mean_and_no_output(mean):
  """Of x around 30 three bits of mantissa would leave nothing of a spread of 1."""
  graph, weights = nnx.split(LayerNorm(256, "float32", nnx.Rngs(0)))
  x = jax.random.normal(jax.random.key(0), (512, 256)) + mean
  kernel = jax.random.normal(jax.random.key(1), (256, 64)) / 16
  layer = lambda weights, x: nnx.merge(graph, weights[0])(x * 2) @ weights[1]
  exact = gradients(layer, (weights, kernel), x)[1]
  less = saved(layer, float8=True, recompute=False)
  assert 0.002 < distance(gradients(less, (weights, kernel), x)[1], exact) < 0.05
  # 8 bits and an exponent a row, mean and deviation; the output would be as much again.
  assert bytes_saved(less, (weights, kernel), x) == 512 * (256 + 1 + 4 + 4)


def test_narrow_rows_stay_as_they_are():
  graph, weights = nnx.split(LayerNorm(16, "float32", nnx.Rngs(0)))
  x = jax.random.normal(jax.random.key(0), (64, 16)) + 30
  layer = lambda weights, x: nnx.merge(graph, weights)(x)
  exact = gradients(layer, weights, x)
  assert distance(gradients(saved(layer, float8=True, recompute=False), weights, x), exact) < 1e-6


def test_masks_come_back_as_they_were():
  x = jax.random.normal(jax.random.key(1), (16, 100))
  layer = lambda w, x: jax.nn.relu(x) * w
  of_x = jax.grad(lambda x: saved(layer, float8=True, recompute=False)(jnp.ones(()), x).sum())(x)
  assert (of_x == (x > 0)).all()


@pytest.mark.parametrize("recomputed, unroll", [(0, 1), (1, 3), (3, 2), (5, 1)])
def test_any_split_of_a_stack_computes_the_same(recomputed, unroll):
  """Four layers behind one that is not in the stack, with dropout by the layer's number."""
  stack = jax.random.normal(jax.random.key(0), (4, 32, 32)) / 6
  x = jax.random.normal(jax.random.key(1), (8, 32))
  keys = example_keys(jax.random.key(2), 0, 8)

  def layer(w, x, index, keys):
    folded = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
    return dropout(jnp.tanh(x @ w), 0.2, folded)

  def by_hand(stack, x, keys):
    for index in range(4):
      x = layer(stack[index], x, index, keys)
    return x

  def scanned(asked, unroll, early_sums=False):
    keeping = Keeping(recomputed=recomputed, unroll=asked, early_sums=early_sums)
    return lambda stack, x, keys: scan(keeping, layer, x, stack, keys, first=1, unroll=unroll)

  exact = gradients(by_hand, stack, x, keys)
  assert distance(gradients(scanned(0, unroll), stack, x, keys), exact) < 1e-5
  assert distance(gradients(scanned(7, unroll), stack, x, keys), exact) < 1e-5
  assert distance(gradients(scanned(7, unroll, early_sums=True), stack, x, keys), exact) < 1e-5


def test_an_unrolled_stack_has_no_loop():
  stack, x = jnp.ones((4, 32, 32)), jnp.ones((8, 32))
  layer = lambda w, x, index: jnp.tanh(x @ w) + index
  of = lambda unroll: jax.jit(lambda stack, x: scan(Keeping(unroll=unroll), layer, x, stack))
  loops = [of(unroll).lower(stack, x).as_text().count("stablehlo.while") for unroll in (0, 2, 4)]
  assert loops == [1, 1, 0]


def test_early_sums_are_awaited_one_layer_on():
  """Of four layers' weights those of three, each with the carry in front of the layer before."""
  stack, x = jnp.ones((4, 32, 32)), jnp.ones((8, 32))
  layer = lambda w, x, index: jnp.tanh(x @ w) + index

  def pairs(early):
    keeping = Keeping(unroll=4, early_sums=early)
    program = jax.make_jaxpr(jax.grad(lambda w: scan(keeping, layer, x, w).sum()))(stack)
    barriers = [e for e in program.jaxpr.eqns if e.primitive.name == "optimization_barrier"]
    shapes = [[v.aval.shape for v in e.invars] for e in barriers]
    return shapes.count([(32, 32), (8, 32)])

  assert (pairs(True), pairs(False)) == (3, 0)


def test_a_layer_that_is_not_numbered_is_never_recomputed():
  module = nnx.Linear(32, 32, rngs=nnx.Rngs(0))
  x = jnp.ones((4, 32))

  def traced(**number):
    function = lambda x: run(Keeping(recomputed=1), module, x, **number).sum()
    return str(jax.make_jaxpr(jax.grad(function))(x))

  assert "optimization_barrier" in traced(layer=0)
  assert "optimization_barrier" not in traced(layer=1)
  assert "optimization_barrier" not in traced()
