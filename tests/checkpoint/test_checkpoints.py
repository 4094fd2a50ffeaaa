"""Checkpoints of small trees: exact, kept by age and by merit, checked, and failing loudly."""

import resource
import shutil

import hurt
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from gemjax.checkpoint import CheckpointError, Checkpoints
from gemjax.checkpoint.checked import COMMITTED


@pytest.fixture(autouse=True)
def quiet():
  before = logging.get_verbosity()
  logging.set_verbosity(logging.FATAL)  # As in the binaries.
  yield
  logging.set_verbosity(before)


@pytest.fixture
def folder(tmp_path):
  return tmp_path / "checkpoints"


def tree(seed=0):
  """Int keys, a list, a tuple, scalars, bfloat16, nan: what a training state may hold."""
  rng = np.random.default_rng(seed)
  return {
    "stacks": {4: jnp.asarray(rng.normal(size=(50, 4)), jnp.bfloat16), 16: jnp.zeros((3, 16))},
    "layers": {"mlp": {0: jnp.asarray(rng.normal(size=30)), 1: jnp.ones(2), 10: jnp.arange(4)}},
    "opt": (jnp.zeros((), jnp.int32), [jnp.full(3, np.nan), jnp.ones((1, 4))]),
    "flags": jnp.array([True, False]),
    "bits": jnp.asarray(rng.integers(0, 2**32, 9, dtype=np.uint32)),
  }


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype and x.shape == y.shape
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_every_bit_comes_back(folder):
  state, notes = tree(), {"position": {"next": 3}, "best": None, "loss": 0.1}
  checkpoints = Checkpoints(folder, keep=1)
  checkpoints.save(7, state, notes, best=None)
  checkpoints.wait()
  for reader in (checkpoints, Checkpoints(folder), Checkpoints(folder, read_only=True)):
    found = reader.restore(jax.eval_shape(tree))
    same(found.state, state)
    assert (found.step, found.notes, reader.notes()) == (7, notes, notes)


def test_donating_the_state_at_once_does_not_reach_the_checkpoint(folder):
  """Saving is asynchronous: the next steps overwrite the very buffers."""
  step = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = jnp.zeros((1000, 500))
  checkpoints = Checkpoints(folder, keep=9)
  for number in range(4):
    checkpoints.save(number, {"x": x}, {}, best=None)
    for _ in range(3):
      x = step(x)
  checkpoints.wait()
  like = {"x": jax.ShapeDtypeStruct((1000, 500), jnp.float32)}
  for number in range(4):
    found = np.unique(checkpoints.restore(like, number).state["x"])
    assert found.tolist() == [3 * number]


def test_the_latest_and_the_best_are_kept(folder):
  checkpoints = Checkpoints(folder, keep=2)
  kept = []
  for step in range(1, 7):
    checkpoints.save(step, {"x": jnp.zeros(2)}, {}, best=2 if step < 6 else 4)
    checkpoints.wait()
    kept.append(checkpoints.steps)
  assert kept[:5] == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5]]
  assert kept[5] == [4, 5, 6]  # 2 is no longer the best.
  checkpoints.close()
  again = Checkpoints(folder, keep=1)
  again.save(7, {"x": jnp.zeros(2)}, {}, best=5)
  again.wait()
  assert again.steps == [5, 7]


def test_a_save_in_progress_does_not_count_and_a_reader_leaves_it(folder):
  checkpoints = Checkpoints(folder, keep=3)
  checkpoints.save(1, {"x": jnp.zeros(2)}, {}, best=None)
  checkpoints.wait()
  half = folder / "000000002.orbax-checkpoint-tmp"
  half.mkdir()
  reader = Checkpoints(folder, read_only=True)
  assert reader.steps == checkpoints.steps == [1]
  reader.close()
  assert half.is_dir()
  checkpoints.save(3, {"x": jnp.ones(2)}, {"late": 1}, best=None)
  checkpoints.wait()
  assert reader.notes() == {"late": 1}  # A reader sees what came after it was opened.
  Checkpoints(folder).close()
  assert not half.exists()  # Of a writer that was killed.


def test_whatever_byte_is_hurt_nothing_wrong_is_restored(folder, tmp_path):
  state = tree()
  checkpoints = Checkpoints(folder, keep=1)
  checkpoints.save(1, state, {"note": 1}, best=None)
  checkpoints.wait()
  harmed, copy = 0, tmp_path / "copy"
  files = [f for f in folder.rglob("*") if f.is_file() and f.name != COMMITTED and f.stat().st_size]
  for target in hurt.copies(folder, files, copy):
    try:
      found = Checkpoints(copy, read_only=True).restore(jax.eval_shape(tree))
      same(found.state, state)  # Orbax's own book-keeping may be hurt without effect.
      assert found.notes == {"note": 1} and target.name == "_CHECKPOINT_METADATA"
    except CheckpointError as error:
      harmed += 1
      assert target.name in str(error) or target.name == "digest.json"
      assert "train anew" in str(error)
  assert harmed >= 3 * 6


def test_a_hurt_checkpoint_is_set_aside_for_the_newest_sound_one(folder, tmp_path):
  checkpoints = Checkpoints(folder, keep=3)
  for step in (1, 2, 3):
    checkpoints.save(step, tree(step), {"note": step}, best=None)
    checkpoints.wait()
  checkpoints.close()
  harms = {
    "state": lambda f: shutil.rmtree(f / "state"),
    "metadata": lambda f: (f / "notes" / "metadata").write_text('{"note": 9}'),
    "digest.json": lambda f: (f / "state" / "digest.json").write_text("{}x"),
  }
  for name, harm in harms.items():
    copy = shutil.copytree(folder, tmp_path / name)
    harm(copy / f"{3:09d}")
    with pytest.raises(CheckpointError, match=rf"{name}.*; choose another of the steps \[1, 2\]"):
      Checkpoints(copy, read_only=True).restore(jax.eval_shape(tree))
    assert Checkpoints(copy, read_only=True).steps == [1, 2, 3]
    hurt = Checkpoints(copy, keep=2)
    found = hurt.restore(jax.eval_shape(tree))
    same(found.state, tree(2))
    assert (found.step, found.notes) == (2, {"note": 2})
    (sentence,) = found.passed
    assert name in sentence and "step 3 is set aside as 000000003.corrupt-1" in sentence
    assert sentence.endswith("goes on from step 2")
    assert hurt.steps == [1, 2] and (copy / "000000003.corrupt-1").is_dir()
    hurt.save(3, tree(4), {"note": 4}, best=None)  # Its name is free again.
    hurt.wait()
    same(hurt.restore(jax.eval_shape(tree)).state, tree(4))
    harm(copy / f"{3:09d}")
    harm(copy / f"{2:09d}")
    before = sorted(f.name for f in copy.iterdir())
    with pytest.raises(CheckpointError, match=rf"{name}.*no other of the steps \[2, 3\] is sound"):
      hurt.restore(jax.eval_shape(tree))
    assert sorted(f.name for f in copy.iterdir()) == before
    hurt.close()


@pytest.mark.parametrize("item", ["state", "notes"])
def test_what_cannot_be_read_is_not_taken_for_corrupt(folder, item):
  """Access that was denied is given again: nothing is set aside."""
  with Checkpoints(folder, keep=2) as checkpoints:
    for step in (1, 2):
      checkpoints.save(step, tree(step), {}, best=None)
      checkpoints.wait()
    digest = folder / f"{2:09d}" / item / "digest.json"
    digest.rename(digest.with_name("kept"))
    digest.mkdir()  # Root may read all files, but no folder as one.
    with pytest.raises(CheckpointError, match=rf"{2:09d} could not be read .*{item}/digest.json"):
      checkpoints.restore(jax.eval_shape(tree))
    digest.rmdir()
    digest.with_name("kept").rename(digest)
    assert checkpoints.restore(jax.eval_shape(tree)).step == 2


def test_what_does_not_exist(folder):
  with pytest.raises(CheckpointError, match="holds no checkpoint; train first"):
    Checkpoints(folder, read_only=True)
  checkpoints = Checkpoints(folder)
  with pytest.raises(CheckpointError, match="holds no checkpoint; train first"):
    checkpoints.restore({})
  checkpoints.save(4, {"x": jnp.zeros(2)}, {}, best=None)
  checkpoints.wait()
  with pytest.raises(CheckpointError, match=r"no checkpoint of step 5, only of \[4\]"):
    checkpoints.notes(5)
  with pytest.raises(CheckpointError, match="another shape"):
    checkpoints.restore({"y": jax.ShapeDtypeStruct((2,), jnp.float32)})


def test_a_full_disk_fails_the_save_keeps_the_last_and_leaves_nothing(folder):
  noise = jnp.asarray(np.random.default_rng(0).normal(size=100_000))
  checkpoints = Checkpoints(folder, keep=1)
  checkpoints.save(1, {"x": noise[:10]}, {}, best=None)
  checkpoints.wait()
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
  try:
    with pytest.raises(CheckpointError, match=r"failed .*last complete one is step 1; free the"):
      checkpoints.save(2, {"x": noise}, {}, best=None)
      checkpoints.wait()
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert checkpoints.steps == [1]
  checkpoints.close()
  assert [f.name for f in folder.iterdir()] == ["000000001"]
