"""Linear maps against nnx.Linear and numpy, with whole kernels and with shards of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from gemjax.config import DATA, MODEL
from gemjax.layers.linear import Linear, contract

X_BI = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_whole_kernel_gives_the_bits_of_nnx_linear(dtype):
  ours, rngs = [], nnx.Rngs(3)
  theirs, their_rngs = [], nnx.Rngs(3)
  for outputs in (7, 4):  # The second sees whether as many keys are drawn.
    ours.append(Linear(12, outputs, dtype=dtype, rngs=rngs))
    theirs.append(nnx.Linear(12, outputs, dtype=dtype, rngs=their_rngs))
  for mine, other in zip(ours, theirs):
    np.testing.assert_array_equal(mine.kernel[...], other.kernel[...])
    np.testing.assert_array_equal(mine.bias[...], other.bias[...])
    assert mine.kernel[...].dtype == jnp.float32 and mine(X_BI).dtype == dtype
    np.testing.assert_array_equal(mine(X_BI), other(X_BI))


def test_turned_inputs_and_outputs_are_those_of_a_turned_kernel():
  """On a CPU: rows (2 x 6) and columns (4 x 3), each in the order of their second factor first."""
  layer = Linear(12, 12, dtype="float32", rngs=nnx.Rngs(0))
  layer.bias[...] = jnp.arange(12.0)
  turned = lambda a, outer: a.reshape(5, outer, -1).swapaxes(1, 2).reshape(5, 12)
  plain, of_plain = jax.vjp(lambda x: layer(x), X_BI)
  found, of_found = jax.vjp(lambda x: layer(x, 2, 4), turned(X_BI, 2))
  np.testing.assert_allclose(found, turned(plain, 4), atol=1e-5)
  weight = np.random.default_rng(1).normal(size=(5, 12)).astype(np.float32)
  (of_x,), (of_turned,) = of_plain(weight), of_found(turned(weight, 4))
  np.testing.assert_allclose(of_turned, turned(of_x, 2), atol=1e-5)


def test_parameters_name_their_axes():
  layer = Linear(12, 7, dtype="float32", rngs=nnx.Rngs(0))
  assert layer.kernel.axes == ("fan_in", "fan_out") and layer.bias.axes == ("fan_out",)


@pytest.mark.parametrize("equation", ["bi,io->bo", "bid,io->bod"])
def test_a_sharded_kernel_is_the_whole_one(equation):
  """The sum of squares by numpy in float64: y, dx = 2 dy Wᵀ, dW = 2 xᵀ dy over all devices."""
  rng = np.random.default_rng(1)
  shape = (8, 12) if equation == "bi,io->bo" else (8, 12, 3)
  x, kernel = rng.normal(size=shape), rng.normal(size=(12, 5))
  mesh = Mesh(np.array(jax.devices()[:8]).reshape(2, 4), (DATA, MODEL))

  def loss(x, shard):
    assert shard.shape == (3, 5)
    y = contract(equation, x, shard, 12, "float32")
    return jnp.square(y).sum(), y

  def local(x, shard):
    (_, y), (dx, dk) = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(x, shard)
    return y, dx, jax.lax.psum(dk, DATA)

  batch, split = PartitionSpec((DATA, MODEL)), PartitionSpec(MODEL)
  step = jax.shard_map(
    local, mesh=mesh, in_specs=(batch, split), out_specs=(batch, batch, split), check_vma=False
  )
  y, dx, dk = jax.jit(step)(x.astype(np.float32), kernel.astype(np.float32))
  operands, result = equation.split("->")
  left, right = operands.split(",")
  expected = np.einsum(equation, x, kernel)
  close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
  close(y, expected)
  close(dx, np.einsum(f"{result},{right}->{left}", 2 * expected, kernel))
  close(dk, np.einsum(f"{left},{result}->{right}", x, 2 * expected))
