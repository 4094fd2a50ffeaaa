"""Where parameters, optimiser state and gradients lie."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gemjax import config as c
from gemjax.config import DATA, MODEL
from gemjax.models import Ranker
from gemjax.parallel.placement import param_specs, reduce_gradients, spec, state_specs
from gemjax.train.optimizer import dense_optimizer


def abstract(**model):
  model = {"layers": 4, "fmb_units": 8, "lcb_units": 8, "rank": 7, "mlp": (320,)} | model
  config = c.Config(name="x", model=c.Wukong(**model))
  make = lambda: Ranker(config, units=11, small=0, dense=0, tasks=1, rngs=nnx.Rngs(0))
  return nnx.split(nnx.eval_shape(make))[1]


def mesh_of(data, model):
  return Mesh(np.array(jax.devices()[:8]).reshape(data, model), (DATA, MODEL))


def test_large_kernels_that_divide_are_sharded_and_nothing_else():
  params = abstract()
  specs = param_specs(params, {DATA: 1, MODEL: 8})
  pure = nnx.to_pure_dict(params)
  assert jax.tree.structure(specs) == jax.tree.structure(pure)
  first, layers = specs["model"]["first"], specs["model"]["layers"]
  # 77 x 320 is large, but 77 rows do not divide by 8; by 7 they do.
  assert pure["model"]["first"]["mlp"]["layers"][0]["kernel"].shape == (77, 320)
  assert first["mlp"]["layers"][0]["kernel"] == P(None, None)
  seven = param_specs(params, {DATA: 1, MODEL: 7})["model"]["first"]
  assert seven["mlp"]["layers"][0]["kernel"] == P(MODEL, None)
  assert first["mlp"]["layers"][1]["kernel"] == P(MODEL, None)  # (320, 128)
  # Stacked layers: three of (112, 320), sharded inside a layer, never between layers.
  assert layers["mlp"]["layers"][0]["kernel"] == P(None, MODEL, None)
  assert first["fm"]["y_NK"] == first["compress"]["kernel_NL"] == P(None, None)  # Small.
  kernels = {path[-1].key for path, s in jax.tree_util.tree_leaves_with_path(specs) if MODEL in s}
  assert kernels == {"kernel"}


def test_the_size_that_counts_is_that_of_one_layer():
  """128 x 120 is below 2^14 = 128 x 128, however many layers there are."""

  def placed(hidden):
    params = abstract(rank=8, mlp=(hidden,), layers=9)
    specs = param_specs(params, {DATA: 2, MODEL: 4})
    return specs["model"]["layers"]["mlp"]["layers"][0]["kernel"]

  assert placed(120) == P(None, None, None)
  assert placed(128) == P(None, MODEL, None)


@pytest.mark.parametrize(("shape", "rows"), [((8, 1), 320), ((4, 2), 160), ((1, 8), 40)])
def test_a_device_holds_its_rows_only(shape, rows):
  params, mesh = abstract(), mesh_of(*shape)
  specs = param_specs(params, mesh.shape)
  shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
  zeros = lambda: jax.tree.map(lambda p: jnp.zeros(p.shape), nnx.to_pure_dict(params))
  first = jax.jit(zeros, out_shardings=shardings)()["model"]["first"]["mlp"]["layers"]
  assert {s.data.shape for s in first[1]["kernel"].addressable_shards} == {(rows, 128)}
  assert {s.data.shape for s in first[0]["kernel"].addressable_shards} == {(77, 320)}


@pytest.mark.parametrize(
  "optimizer",
  [
    dense_optimizer(c.Optimizer(clip_norm=1.0, l2=0.1, schedule="cosine"), 10),
    dense_optimizer(c.Optimizer(), 10),
    optax.sgd(0.1, momentum=0.9),
    optax.lion(0.1),
  ],
)
def test_moments_lie_where_their_parameters_do(optimizer):
  params = abstract()
  specs, pure = param_specs(params, {DATA: 2, MODEL: 4}), nnx.to_pure_dict(params)
  state = jax.eval_shape(optimizer.init, pure)
  placed = state_specs(optimizer, pure, specs)
  assert jax.tree.structure(placed) == jax.tree.structure(state)
  by_shape = {p.shape: s for p, s in zip(jax.tree.leaves(pure), jax.tree.leaves(specs))}
  for array, where in zip(jax.tree.leaves(state), jax.tree.leaves(placed)):
    assert where == (by_shape[array.shape] if array.shape else P())
  assert any(MODEL in where for where in jax.tree.leaves(placed))


def test_a_parameter_without_names_is_refused():
  state = nnx.state(nnx.Dict(w=nnx.Param(jnp.zeros((2, 3)), axes=("fan_in",))))
  with pytest.raises(ValueError, match=r"shape \(2, 3\).*one name for each"):
    param_specs(state, {DATA: 1, MODEL: 1})


def test_a_batch_is_split_over_both_axes():
  mesh = mesh_of(2, 4)
  x = jax.device_put(np.arange(16), NamedSharding(mesh, spec("batch")))
  first = {s.device: int(s.data[0]) for s in x.addressable_shards}
  assert [first[d] for d in mesh.devices.flat] == list(range(0, 16, 2))


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 8)])
def test_gradients_are_summed_over_the_devices_that_hold_a_copy(shape):
  """Device (g, m) holds 10 g + m, of a sharded array and of a replicated one."""
  mesh = mesh_of(*shape)
  specs = {"sharded": P(MODEL), "whole": P(None)}

  def local():
    grad = 10.0 * jax.lax.axis_index(DATA) + jax.lax.axis_index(MODEL)
    return reduce_gradients({"sharded": grad[None], "whole": grad[None]}, specs)

  step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(), out_specs=specs, check_vma=False))
  each = np.add.outer(10 * np.arange(shape[0]), np.arange(shape[1]))
  got = step()
  np.testing.assert_array_equal(got["sharded"], each.sum(0))
  np.testing.assert_array_equal(got["whole"], [each.sum()])


def test_one_device_asks_for_no_sum():
  mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), (DATA, MODEL))
  specs = {"a": P(MODEL), "b": P()}
  step = jax.shard_map(
    lambda g: reduce_gradients(g, specs), mesh=mesh, in_specs=(specs,), out_specs=specs,
    check_vma=False,
  )  # fmt: skip
  assert "psum" not in str(jax.make_jaxpr(step)({"a": jnp.ones(2), "b": jnp.ones(2)}))
