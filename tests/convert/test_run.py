"""A run as a file and as a run again: to the bit, as judged by safetensors and by restoring."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from runs import config_of, convert, logits, restored

from gemjax.train.loop import train


def bits(array):
  return np.asarray(array).reshape(-1).view(np.uint8)


def real_rows(trainer, table):
  stack, offset = trainer.tables.layout.positions(table)
  return stack.name, (
    offset + np.arange(trainer.features.tables[table])
  ) * stack.multiplier % stack.rows


def same_weights(one, other):
  """Of two restored runs: dense weights, Adam's moments, and all but the padding of stacks."""
  (trainer, a, _), (_, b, _) = one, other
  for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params)):
    np.testing.assert_array_equal(bits(x), bits(y))
  moments = lambda state: [
    part for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
    if hasattr(part, "mu")
  ]  # fmt: skip
  for x, y in zip(jax.tree.leaves(moments(a)), jax.tree.leaves(moments(b))):
    np.testing.assert_array_equal(bits(x), bits(y))
  for table in trainer.tables.layout.tables:
    name, at = real_rows(trainer, table)
    np.testing.assert_array_equal(bits(a.stacks[name].clock), bits(b.stacks[name].clock))
    for field in ("rows_RW", "marks_R"):
      x, y = (np.asarray(getattr(s.stacks[name], field))[at] for s in (a, b))
      np.testing.assert_array_equal(bits(x), bits(y))
    for slot, x in a.stacks[name].slots.items():
      np.testing.assert_array_equal(np.asarray(x)[at], np.asarray(b.stacks[name].slots[slot])[at])


def test_a_run_through_a_file_is_the_run(trained_run, tmp_path):
  file, run = tmp_path / "run.safetensors", tmp_path / "again"
  convert("gemjax", "safetensors", trained_run, file, verify=True)
  convert("safetensors", "gemjax", file, run, verify=True)
  before, after = restored(trained_run), restored(run)
  assert int(after[1].step) == 0 < int(before[1].step)
  same_weights(before, after)
  assert np.array_equal(logits(run, "test"), logits(trained_run, "test"))
  assert train(before[0].config, run)["train"]["steps"] == 10


def test_safetensors_reads_the_file(trained_run, tmp_path):
  """Layers by their own names, tables in their own order."""
  safetensors = pytest.importorskip("safetensors", reason="judges the files")
  file = tmp_path / "run.safetensors"
  convert("gemjax", "safetensors", trained_run, file)
  trainer, state, _ = restored(trained_run)
  layers = np.asarray(state.params["model"]["layers"]["fm"]["y_NK"])
  with safetensors.safe_open(file, framework="numpy") as found:
    for i in range(2):
      np.testing.assert_array_equal(found.get_tensor(f"model.layers.{i}.fm.y_NK"), layers[i])
    for table in ("user", "item", "hour"):
      name, at = real_rows(trainer, table)
      np.testing.assert_array_equal(
        found.get_tensor(f"tables.{table}.v"), np.asarray(state.stacks[name].slots["v"])[at]
      )
    stacks = {real_rows(trainer, table)[0] for table in ("user", "hour")}
    assert len(stacks) == 2  # One split by row, thus permuted, and one replicated.
    assert json.loads(found.metadata()["gemjax"])["config"]["name"] == "small_gemjax"


def test_floats_are_rounded_to_the_nearest(trained_run, tmp_path):
  torch = pytest.importorskip("torch", reason="rounds independently")
  from safetensors.torch import load_file

  whole, half = tmp_path / "whole.safetensors", tmp_path / "half.safetensors"
  convert("gemjax", "safetensors", trained_run, whole)
  lines = convert("gemjax", "safetensors", trained_run, half, dtype="bfloat16", verify=True)
  assert any("float32 cast" in line for line in lines)
  wanted = load_file(whole)
  for name, tensor in load_file(half).items():
    want = wanted[name].bfloat16() if wanted[name].is_floating_point() else wanted[name]
    assert torch.equal(tensor, want), name
  run = tmp_path / "run"
  convert("safetensors", "gemjax", half, run, verify=True)
  _, state, _ = restored(run)
  kernel = np.asarray(state.params["model"]["layers"]["mlp"]["layers"][0]["kernel"])
  assert kernel.dtype == np.float32 and np.array_equal(kernel, kernel.astype(ml_dtypes.bfloat16))


def test_what_leaves_the_library_is_shrunk_first(trained_run, tmp_path):
  """Rows that were not looked up lately stand for less than is stored."""
  torch = pytest.importorskip("torch", reason="reads the file")
  file = tmp_path / "tables.pt"
  convert("gemjax", "torchrec", trained_run, file)
  trainer, state, _ = restored(trained_run)
  found = torch.load(file, weights_only=True)["model"]
  shrunk = 0
  for table in ("user", "item", "hour"):
    name, at = real_rows(trainer, table)
    stack = jax.tree.map(lambda x: np.asarray(x, np.float64), state.stacks[name])
    rate = 0.1 / (np.sqrt(stack.slots["v"][at]) + 1e-8)
    factor = np.exp(-rate * (stack.clock[0] - stack.marks_R[at]))
    want = stack.rows_RW[at] * factor[:, None]
    np.testing.assert_allclose(found[f"embedding_bags.{table}.weight"], want, rtol=1e-4, atol=1e-9)
    shrunk += (factor < 0.999).sum()
  assert shrunk > 3


def test_another_law_of_shrinking_begins_settled(trained_run, data, tmp_path):
  """The logits stay; marks and clock begin at zero."""
  run = tmp_path / "run"
  config = config_of("gemjax", data, {"weight_decay": 0.1})
  lines = convert("gemjax", "gemjax", trained_run, run, config=config, verify=True)
  assert any(line.startswith("clock") and "initialised" in line for line in lines)
  np.testing.assert_allclose(logits(run, "test"), logits(trained_run, "test"), atol=2e-5)
  _, state, _ = restored(run)
  assert not any(np.asarray(s.clock).any() or np.asarray(s.marks_R).any()
                 for s in state.stacks.values())  # fmt: skip
