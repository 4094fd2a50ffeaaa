"""The rows of stacks before the first step."""

import examples
import jax
import jax.numpy as jnp
import meshes
import numpy as np
import pytest
from meshes import FAST, ONE

from gemjax.embedding import ShardedTables
from gemjax.embedding import stack as stack_lib


def born(data, model, **changes):
  config = examples.embedding(**changes)
  tables = ShardedTables(layout=examples.LAYOUT, config=config, data=data, model=model)
  init = jax.shard_map(
    tables.init, mesh=meshes.make_mesh(data, model), in_specs=ONE, out_specs=tables.specs(),
    check_vma=False,
  )  # fmt: skip
  return jax.jit(init, compiler_options=FAST)(jax.random.key(7))


@pytest.fixture(scope="module")
def one():
  return meshes.numpy(born(1, 1))


@pytest.mark.parametrize(("data", "model"), [(2, 4), (1, 8), (2, 3)])
def test_rows_are_the_same_on_every_mesh(one, data, model, monkeypatch):
  monkeypatch.setattr(stack_lib, "CHUNK", 500)  # However many are drawn at a time.
  stacks = born(data, model)
  meshes.assert_copies_agree(stacks)
  jax.tree.map(np.testing.assert_array_equal, meshes.numpy(stacks), one)


def test_rows_are_normal_and_independent(one):
  for stack in one.values():
    x = stack.rows_RW
    assert abs(x.mean()) < 5 / np.sqrt(x.size)
    assert abs(x.var() - 1) < 5 * np.sqrt(2 / x.size)
    assert abs((x**4).mean() - 3) < 5 * np.sqrt(96 / x.size)
    assert len(np.unique(x)) > 0.99 * x.size  # No row, and no column, is drawn twice.
    assert abs((x[:-1] * x[1:]).mean()) < 5 / np.sqrt(x.size)
  a, b = one["row4"].rows_RW[:768, 0], one["row8"].rows_RW[:768, 0]
  assert abs((a * b).mean()) < 5 / np.sqrt(768)  # Stacks differ.


def test_scale_type_slots_and_clock_are_those_of_the_config(one):
  half = born(1, 1, dtype="bfloat16", weight_decay=0.1, optimizer="lazy_adam")
  for name, stack in half.items():
    assert stack.rows_RW.dtype == jnp.bfloat16
    np.testing.assert_array_equal(stack.rows_RW, one[name].rows_RW.astype(jnp.bfloat16))
    assert set(stack.slots) == {"m", "v", "n"}
    assert not any(np.any(x) for x in (*stack.slots.values(), stack.marks_R, stack.clock))
    assert one[name].marks_R is None and one[name].clock is None
    assert not np.any(one[name].slots["v"])
