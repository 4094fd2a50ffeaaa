"""Every model with its kernels sharded over a mesh against the same model on one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from gemjax import config as c
from gemjax.config import DATA, MODEL
from gemjax.layers.dropout import example_keys
from gemjax.models import Ranker
from gemjax.parallel import placement

B, N, D, S, F, T = 16, 8, 8, 3, 3, 2
MESHES = [(8, 1), (4, 2), (2, 4), (1, 8)]
RATES = {"dropout": 0.3, "feature_dropout": 0.2}
# Compilation is nearly all of the time here, and fusions are not what is tested.
FAST = {
  "xla_backend_optimization_level": 0,
  "xla_llvm_disable_expensive_passes": True,
  "xla_cpu_use_fusion_emitters": False,
}
# Rank 5 and 7 hidden units divide by no mesh: those kernels stay whole.
WUKONG = {"layers": 3, "fmb_units": 4, "lcb_units": 4, "rank": 5, "mlp": (24, 7), "head": (16,)}
SLOW = ("basic", "attentive", "dcnv2", "mlp")  # More of a kind: marked.
MODELS = {
  "basic": c.Wukong(fm="basic", **WUKONG, **RATES),
  "optimised": c.Wukong(fm="optimised", **WUKONG, **RATES),
  "attentive": c.Wukong(fm="attentive", **WUKONG, **RATES),
  "dlrm": c.Dlrm(head=(16, 12), **RATES),
  "dcnv2": c.Dcnv2(layers=2, mlp=(16, 12), **RATES),
  "mlp": c.Mlp(head=(16, 12), **RATES),
  "fm": c.Fm(feature_dropout=0.2),
  "logistic": c.Logistic(feature_dropout=0.2),
}


@pytest.fixture
def every_kernel(monkeypatch):
  """Small kernels are sharded too, so that small models test it."""
  monkeypatch.setattr(placement, "SMALLEST_SHARDED", 1)


def build(model, dtype="float32"):
  """The graph, the abstract parameters by name, and parameters that are nowhere zero."""
  linear = isinstance(model, c.Logistic | c.Fm)
  dim = T if isinstance(model, c.Logistic) else D
  config = c.Config(
    name="x",
    model=model,
    embedding=c.Embedding(dim=dim, small_dim=4, dense_mlp=(16,)),
    train=c.Train(dtype=dtype),
  )
  make = lambda: Ranker(
    config, units=N, small=0 if linear else S, dense=F, tasks=T, rngs=nnx.Rngs(0)
  )
  graph, abstract = nnx.split(nnx.eval_shape(make))
  rng = np.random.default_rng(0)
  draw = lambda p: jnp.asarray(rng.normal(size=p.shape) / p.shape[-2:][0] ** 0.5, jnp.float32)
  params = jax.tree.map(draw, nnx.to_pure_dict(abstract))
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  inputs = normal(B, N, dim), normal(B, 0 if linear else S, 4), normal(B, F)
  return graph, abstract, params, inputs


def loss_of(graph, params, units_BND, rest, keys_B):
  logits_BT = nnx.merge(graph, params)(units_BND, *rest, keys_B)
  return jnp.sum(jax.nn.softplus(logits_BT)) / B, logits_BT


def on_one_device(graph, params, inputs):
  """(logits_BT, (gradients, gradient of units_BND))."""
  keys_B = example_keys(jax.random.key(2), 0, B)
  grad = jax.value_and_grad(functools.partial(loss_of, graph), argnums=(0, 1), has_aux=True)
  step = jax.jit(grad, compiler_options=FAST)
  (_, logits_BT), grads = step(params, inputs[0], inputs[1:], keys_B)
  return logits_BT, grads


def on_mesh(graph, abstract, shape):
  """A jitted function (params, inputs) -> what `on_one_device` returns, on a mesh."""
  mesh = Mesh(np.array(jax.devices()[:8]).reshape(shape), (DATA, MODEL))
  specs, batch = placement.param_specs(abstract, mesh.shape), placement.spec("batch")

  def local(params, inputs):
    count = len(inputs[0])
    keys_B = example_keys(jax.random.key(2), jax.lax.axis_index((DATA, MODEL)) * count, count)
    grad = jax.value_and_grad(functools.partial(loss_of, graph), argnums=(0, 1), has_aux=True)
    (_, logits_BT), (of_params, of_units) = grad(params, inputs[0], inputs[1:], keys_B)
    return logits_BT, (placement.reduce_gradients(of_params, specs), of_units)

  step = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(specs, batch),
    out_specs=(batch, (specs, batch)),
    check_vma=False,
  )
  return jax.jit(step, compiler_options=FAST)


def assert_close(got, expected, tolerance):
  """Entry by entry, relative to it and to the largest of its array."""
  for (path, want), have in zip(
    jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(got), strict=True
  ):
    scale = tolerance * float(jnp.abs(want).max())
    np.testing.assert_allclose(
      have, want, rtol=tolerance, atol=scale, err_msg=jax.tree_util.keystr(path)
    )


@pytest.mark.parametrize(
  "name",
  [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MODELS],
)
def test_every_mesh_gives_the_logits_and_gradients_of_one_device(every_kernel, name):
  graph, abstract, params, inputs = build(MODELS[name])
  expected = on_one_device(graph, params, inputs)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(expected))
  for shape in MESHES:
    assert_close(on_mesh(graph, abstract, shape)(params, inputs), expected, 1e-5)


def test_a_residual_in_shards_beside_a_compression_that_lies_whole(monkeypatch):
  """The first layer's two maps, else one, are then two."""
  graph, abstract, params, inputs = build(MODELS["optimised"])
  first = params["model"]["first"]
  whole, sharded = (first[part]["kernel_NL"] for part in ("compress", "residual"))
  monkeypatch.setattr(placement, "SMALLEST_SHARDED", whole.size + 1)
  specs = placement.param_specs(abstract, {DATA: 4, MODEL: 2})["model"]["first"]
  lies = [specs[part]["kernel_NL"][0] for part in ("compress", "residual")]
  assert lies == [None, MODEL] and sharded.size > whole.size  # 10 rows, on two devices.
  expected = on_one_device(graph, params, inputs)
  assert_close(on_mesh(graph, abstract, (4, 2))(params, inputs), expected, 1e-5)


def test_bfloat16_stays_close_and_travels_in_half_the_bytes(every_kernel):
  graph, abstract, params, inputs = build(MODELS["optimised"], "bfloat16")
  step = on_mesh(graph, abstract, (2, 4))
  assert_close(step(params, inputs), on_one_device(graph, params, inputs), 0.05)
  equations = list(walk(step.trace(params, inputs).jaxpr.jaxpr))
  whole = [e.outvars[0].aval for e in equations if e.primitive.name == "all_gather"]
  # The last kernel of a head computes float32 logits.
  assert {x.dtype.name for x in whole if x.shape[1] > 1} == {"bfloat16"}


def walk(jaxpr):
  """Every equation, those inside of others included."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for inner in value if isinstance(value, tuple | list) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from walk(inner)


@pytest.fixture
def deep():
  """A Wukong of six scanned layers on two meshes; whole kernels on the first."""
  graph, abstract, params, inputs = build(c.Wukong(**WUKONG | {"layers": 7, "mlp": (24,)}))
  return {shape: on_mesh(graph, abstract, shape).trace(params, inputs) for shape in MESHES[::2]}


def test_kernels_are_gathered_layer_by_layer_and_again_for_the_gradient(every_kernel, deep):
  def scans(shape):
    return [e for e in walk(deep[shape].jaxpr.jaxpr) if e.primitive.name == "scan"]

  def count(scan, name):
    return sum(e.primitive.name == name for e in walk(scan.params["jaxpr"].jaxpr))

  forward, backward = scans((2, 4))
  # Y and W_L as one, and the two of the MLP.
  assert count(forward, "all_gather") == count(backward, "all_gather") == 3
  assert count(forward, "reduce_scatter") == 0 and count(backward, "reduce_scatter") == 3
  # What the forward pass keeps is what it keeps with whole kernels: activations, no kernel. And no
  # product is computed twice.
  for sharded, whole in zip(scans((2, 4)), scans((8, 1))):
    assert count(sharded, "dot_general") == count(whole, "dot_general")
  kept = [[v.aval.shape for v in scans(shape)[0].outvars] for shape in ((2, 4), (8, 1))]
  assert kept[0] == kept[1]


def test_compiled_kernels_travel_inside_a_model_group_only(every_kernel, deep):
  text = deep[2, 4].lower().compile().as_text()

  def groups(operation):
    lines = [x for x in text.splitlines() if re.search(rf" {operation}(-start)?\(", x)]
    return len(lines), {re.search(r"replica_groups=(\S+?), ", x)[1] for x in lines}

  inside, across = "{{0,1,2,3},{4,5,6,7}}", "{{0,4},{1,5},{2,6},{3,7}}"
  gathers, where = groups("all-gather")
  scatters, where_scattered = groups("reduce-scatter")
  assert where == where_scattered == {inside}
  assert gathers > scatters > 0
  assert groups("all-reduce")[1] == {across, "{{0,1,2,3,4,5,6,7}}"}
  whole = deep[8, 1].lower().compile().as_text()
  assert len(re.findall(r" dot\(", text)) == len(re.findall(r" dot\(", whole)) > 0
  assert not re.search(r"all-gather|reduce-scatter", whole)
