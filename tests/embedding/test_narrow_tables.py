"""Tables in float8 and exchange in bfloat16, by row, by column and replicated, on meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from meshes import FAST, make_mesh

from gemjax.config import DATA, MODEL, Embedding
from gemjax.embedding import ShardedTables, layout_tables
from gemjax.features import Batch, FeatureSet, Sparse
from gemjax.fields import ConfigError

B, ROWS, WIDTH = 32, 90, 8
NAMES = ("row", "column", "replicated")
STACKS = dict(zip(("row8", "column8", "replicated8"), NAMES))
ALL, ONE = PartitionSpec((DATA, MODEL)), PartitionSpec()


class Run:
  """One mesh, its tables and their steps with gradients that sum to the same bits in any order."""

  def __init__(self, data, model, **changes):
    features = FeatureSet(sparse=tuple(Sparse(name=n, size=ROWS, table=n) for n in NAMES))
    config = Embedding(
      dim=WIDTH, placement={n: n for n in NAMES}, optimizer="sgd", init_scale=1.0, **changes
    )
    self.layout = layout_tables(features, config)
    self.tables = ShardedTables.on_mesh(self.layout, config, data, model)
    self.tables = self.tables.with_capacity({"row8": B})
    specs = self.tables.specs()
    wrap = functools.partial(jax.shard_map, mesh=make_mesh(data, model), check_vma=False)
    compiled = functools.partial(jax.jit, compiler_options=FAST)
    self.init = compiled(wrap(self.tables.init, in_specs=ONE, out_specs=specs))
    self.mapped = wrap(self._step, in_specs=(specs, ALL, ALL, ONE, ONE), out_specs=(specs, ALL))
    self.step = compiled(self.mapped)

  def _step(self, stacks, batch, grads, lr, key):
    plans = self.tables.plan(batch)
    rows = self.tables.lookup(stacks, plans)
    return self.tables.update(stacks, plans, grads, lr, key), rows


def batch_of(rng):
  return Batch(
    **{name: np.zeros((B, 1), np.float32) for name in ("dense_BF", "label_BT", "oracle_BT")},
    **{name: np.zeros(B, np.float32) for name in ("weight_B", "group_B")},
    ids_BS=rng.integers(0, ROWS, (B, 3)).astype(np.int32),
    sequences={},
  )


def grads_of(rng):
  return {s: rng.integers(-4, 5, (B, WIDTH)).astype(np.float32) / 8 for s in STACKS}


def steps(run, count=3, rate=2.0**-7):
  rng, stacks = np.random.default_rng(0), run.init(jax.random.key(3))
  states, rows = [jax.tree.map(np.asarray, stacks)], []
  for t in range(count):
    args = (batch_of(rng), grads_of(rng), np.float32(rate), jax.random.key(t))
    stacks, looked = run.step(stacks, *args)
    states.append(jax.tree.map(np.asarray, stacks))
    rows.append(jax.tree.map(np.asarray, looked))
  return states, rows


def weights(stack):
  return stack.rows_RW.astype(np.float64) * stack.scales_R.astype(np.float64)[:, None]


@pytest.fixture(scope="module")
def one():
  run = Run(1, 1, dtype="float8_e4m3fn")
  return run, *steps(run)


def test_float8_tables_follow_the_oracle_within_a_step_of_the_format(one):
  """From every state one exact step in float64: what is stored is the value below or above it."""
  run, states, looked = one
  rng, errors = np.random.default_rng(0), []
  for t in range(3):
    batch, grads = batch_of(rng), grads_of(rng)
    for column, stack in enumerate(run.layout.stacks):
      before, after = states[t][stack.name], states[t + 1][stack.name]
      at_B = batch.ids_BS[:, column].astype(np.int64) * stack.multiplier % stack.rows
      exact = weights(before)
      np.testing.assert_array_equal(looked[t][stack.name], exact[at_B].astype(np.float32))
      np.subtract.at(exact, at_B, 2.0**-7 * grads[stack.name].astype(np.float64))
      touched = np.unique(at_B)
      # The step of the format at a weight: 2^(octave - 3), at least 2^-9, times the row's scale.
      scale = after.scales_R[touched].astype(np.float64)[:, None]
      octave = np.floor(np.log2(np.maximum(np.abs(exact[touched]) / scale, 2.0**-6)))
      error = (weights(after)[touched] - exact[touched]) / (scale * 2 ** (octave - 3))
      errors.append(error.ravel())
      rest = np.setdiff1d(np.arange(stack.rows), touched)
      assert after.rows_RW[rest].tobytes() == before.rows_RW[rest].tobytes()
      np.testing.assert_array_equal(after.scales_R[rest], before.scales_R[rest])
  errors = np.concatenate(errors)
  assert len(errors) > 1_000 and np.abs(errors).max() < 1.001
  assert abs(errors.mean()) < 5 * 0.5 / np.sqrt(len(errors))


@pytest.mark.parametrize(("data", "model"), [(2, 2), (1, 4)])
def test_float8_tables_have_the_same_bits_on_every_mesh(data, model, one):
  _, expected, looked = one
  states, rows = steps(Run(data, model, dtype="float8_e4m3fn"))
  for name in STACKS:
    np.testing.assert_array_equal(rows[-1][name], looked[-1][name])
    for found, wanted in zip(states, expected):
      assert found[name].rows_RW.tobytes() == wanted[name].rows_RW.tobytes()
      np.testing.assert_array_equal(found[name].scales_R, wanted[name].scales_R)


def test_averaged_float8_tables_are_between_their_copies():
  run = Run(2, 1, dtype="float8_e4m3fn", replicas="average")
  specs = run.tables.specs()
  average = jax.shard_map(
    run.tables.average, mesh=make_mesh(2, 1), in_specs=(specs, ONE), out_specs=specs,
    check_vma=False,
  )  # fmt: skip
  stacks = run.step(
    run.init(jax.random.key(3)), batch_of(np.random.default_rng(0)),
    grads_of(np.random.default_rng(1)), np.float32(2.0**-7), jax.random.key(0),
  )[0]  # fmt: skip
  shard = lambda i: lambda x: np.asarray(x.addressable_shards[i].data)
  copies = {
    name: [weights(jax.tree.map(shard(i), stack)) for i in (0, 1)] for name, stack in stacks.items()
  }
  merged = jax.jit(average, compiler_options=FAST)(stacks, jax.random.key(5))
  for name, (a, b) in copies.items():
    assert (a != b).any()
    stack = jax.tree.map(np.asarray, merged[name])
    spacing = np.maximum(np.abs((a + b) / 2) / 8, stack.scales_R[:, None] * 2.0**-9)
    assert (np.abs(weights(stack) - (a + b) / 2) <= spacing * 1.001).all()
    same = (a == b).all(1)
    np.testing.assert_array_equal(weights(stack)[same], a[same])


def exchanged(run):
  """{(primitive, dtype)} of what travels with a width."""
  rng = np.random.default_rng(0)
  args = (batch_of(rng), grads_of(rng), np.float32(0.1), jax.random.key(0))
  shapes = jax.eval_shape(run.init, jax.random.key(0))
  found = set()

  def visit(jaxpr):
    for eqn in jaxpr.eqns:
      if eqn.primitive.name in ("all_to_all", "all_gather"):
        x = eqn.invars[0].aval
        if jnp.issubdtype(x.dtype, jnp.floating):  # Not of ids.
          found.add((eqn.primitive.name, x.dtype.name))
      for value in eqn.params.values():
        for inner in value if isinstance(value, tuple | list) else (value,):
          inner = getattr(inner, "jaxpr", inner)
          if hasattr(inner, "eqns"):
            visit(inner)

  visit(jax.make_jaxpr(run.mapped)(shapes, *args).jaxpr)
  return found


def test_each_exchange_has_its_own_type():
  """Gradients alone are gathered, and rows alone are exchanged where no gradient has a batch."""
  plain = exchanged(Run(2, 2))
  assert {dtype for _, dtype in plain} == {"float32"}
  both = exchanged(Run(2, 2, exchange_dtype="bfloat16", gradient_dtype="bfloat16"))
  assert {dtype for _, dtype in both} == {"bfloat16"}
  rows = exchanged(Run(2, 2, exchange_dtype="bfloat16"))
  assert rows == {("all_to_all", "bfloat16"), ("all_to_all", "float32"), ("all_gather", "float32")}
  grads = exchanged(Run(2, 2, gradient_dtype="bfloat16"))
  assert grads == {
    ("all_to_all", "bfloat16"),
    ("all_to_all", "float32"),
    ("all_gather", "bfloat16"),
  }


def test_rows_and_gradients_in_bfloat16_are_the_rounded_ones():
  """One step from the same rows: looked-up rows and total gradients are off by a rounding each."""
  plain, after = steps(Run(1, 2), 1)
  states, looked = steps(Run(1, 2, exchange_dtype="bfloat16", gradient_dtype="bfloat16"), 1)
  for name in ("row8", "column8"):
    expected = after[0][name].astype(jnp.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(looked[0][name], expected)
    # These gradients, and the sums of a device, are numbers of bfloat16: nothing else differs.
    np.testing.assert_array_equal(states[1][name].rows_RW, plain[1][name].rows_RW)


def test_rows_in_float8_are_those_of_float8_tables():
  """Looked-up rows are off by half a step of e4m3 at most, and travel as bytes."""
  _, after = steps(Run(1, 2), 1)
  narrow = {"exchange_dtype": "float8_e4m3fn", "gradient_dtype": "float8_e4m3fn"}
  _, looked = steps(Run(1, 2, **narrow), 1)
  found, plain = looked[0]["row8"], after[0]["row8"]
  most = np.abs(plain).max(1, keepdims=True)
  assert (np.abs(found - plain) <= np.maximum(np.abs(plain) / 16, most * 2.0**-17)).all()
  assert (found != plain).any()
  # Of floats the scales alone.
  assert exchanged(Run(2, 2, **narrow)) == {("all_to_all", "float32"), ("all_gather", "float32")}


def test_types_that_do_not_exist_are_refused():
  from gemjax.config import Config

  for field in ("dtype", "exchange_dtype", "gradient_dtype"):
    with pytest.raises(ConfigError, match=rf"config\.embedding\.{field} is 'float4'"):
      Config(name="x", embedding=Embedding(**{field: "float4"})).validate()
