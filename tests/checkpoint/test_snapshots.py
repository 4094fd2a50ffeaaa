"""Snapshots of small trees: exact, whole or not there, and given by whoever holds the same."""

import os
import shutil

import hurt
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import side_by_side
from jax.sharding import NamedSharding, PartitionSpec

from gemjax.checkpoint import CheckpointError, Snapshots
from gemjax.checkpoint import snapshots as snapshots_lib
from gemjax.checkpoint.snapshots import PARTIAL, REMOVED
from gemjax.parallel.mesh import make_mesh

SPECS = {
  "rows": PartitionSpec("model"),
  "columns": PartitionSpec(None, "model"),
  "both": PartitionSpec(("data", "model")),
  "small": PartitionSpec(),
}


def state(mesh, seed=0):
  """Types and bits of all kinds, each array sharded in another way."""
  rng = np.random.default_rng(seed)
  bits = lambda *shape: rng.integers(0, 2**16, shape, np.uint16)
  tree = {
    "rows": {
      "bfloat16": jnp.asarray(bits(48, 4)).view(
        jnp.bfloat16
      ),  # NaNs of many bits, zeros of both signs.
      "bool": jnp.asarray(rng.random(24) < 0.5),
    },
    "columns": [jnp.asarray(rng.normal(size=(3, 48)), jnp.float32)],
    "both": jnp.asarray(rng.integers(0, 256, 48), jnp.uint8).view(jnp.float8_e4m3fn),
    "small": (jnp.int32(-seed), jnp.full(3, -0.0)),
  }
  place = lambda spec, sub: jax.tree.map(
    lambda x: jax.make_array_from_callback(
      x.shape, NamedSharding(mesh, spec), lambda index: np.asarray(x)[index]
    ),
    sub,
  )
  return {name: place(SPECS[name], sub) for name, sub in tree.items()}


def like(tree):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert x.dtype == y.dtype and x.sharding == y.sharding
    for one, other in zip(x.addressable_shards, y.addressable_shards):
      assert np.asarray(one.data).tobytes() == np.asarray(other.data).tobytes()


@pytest.fixture(params=[(1, 1), (2, 2), (1, 4)], ids=lambda m: f"{m[0]}x{m[1]}")
def mesh(request):
  count = request.param[0] * request.param[1]
  return make_mesh(*request.param, jax.devices()[:count])


@pytest.fixture
def folder(tmp_path):
  return tmp_path / "host" / "run-1"


def saved(folder, *steps, mesh=None, **options):
  mesh = mesh or make_mesh(1, 1, jax.devices()[:1])
  snapshots = Snapshots(folder, **options)
  for step in steps:
    snapshots.save(step, state(mesh, step), {"step": step})
  snapshots.wait()
  return snapshots, like(state(mesh))


def test_every_bit_comes_back_to_where_it_was(mesh, folder):
  snapshots, asked = saved(folder, 7, mesh=mesh)
  found, passed = snapshots.restore(asked, snapshots.steps(after=6))
  same(found.state, state(mesh, 7))
  assert (found.step, found.notes, found.passed, passed) == (7, {"step": 7}, (), [])
  assert snapshots.notes(7) == {"step": 7}
  assert snapshots.steps(after=7) == []


def test_a_shard_is_written_once_whatever_holds_it(folder):
  mesh = make_mesh(4, 2, jax.devices())
  x = jax.device_put(np.zeros((1024, 8), np.float32), NamedSharding(mesh, PartitionSpec("model")))
  snapshots = Snapshots(folder)
  snapshots.save(1, {"x": x}, {})
  snapshots.wait()
  (file,) = folder.rglob("arrays")
  assert file.stat().st_size == x.nbytes  # Two shards, on four devices each.


def test_donating_the_state_at_once_does_not_reach_the_snapshot(folder):
  step = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = jnp.zeros((1000, 500))
  snapshots = Snapshots(folder)
  for number in range(4):
    snapshots.save(number, {"x": x}, {})
    for _ in range(3):
      x = step(x)
  asked = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)}
  snapshots.wait()
  for number in (3, 2):
    found, _ = snapshots.restore(asked, snapshots.steps(after=1))
    assert found.step == number
    assert np.unique(found.state["x"]).tolist() == [3 * number]
    shutil.rmtree(folder / f"{number:09d}.0")


def test_two_are_kept_and_others_leave_no_trace(folder):
  snapshots, asked = saved(folder, 1, 2, 3, 4)
  assert sorted(f.name for f in folder.iterdir()) == ["000000003.0", "000000004.0"]
  for half in (f"000000005.0{PARTIAL}", f"000000002.0{REMOVED}", "000000003.1"):
    (folder / half).mkdir()  # As of a process that was killed, and of one that is elsewhere now.
  assert Snapshots(folder).steps(after=0) == [4, 3]
  snapshots.keep(4)
  assert [f.name for f in folder.iterdir()] == ["000000004.0"]
  found, _ = snapshots.restore(asked, snapshots.steps(after=0))
  assert found.step == 4
  snapshots.clear()
  assert not folder.exists() and folder.parent.exists()


def test_whatever_byte_is_hurt_the_one_before_is_taken(folder, tmp_path):
  _, asked = saved(folder, 1, 2)
  mesh, harmed, copy = make_mesh(1, 1, jax.devices()[:1]), 0, tmp_path / "copy"
  files = [f for f in (folder / "000000002.0").rglob("*") if f.is_file()]
  for target in hurt.copies(folder, files, copy):
    found, passed = Snapshots(copy).restore(asked, [2, 1])
    assert found.step == 1, target
    same(found.state, state(mesh, 1))
    (sentence,) = passed
    assert str(target) in sentence and sentence.endswith(": step 2 is passed over"), sentence
    harmed += 1
  assert harmed == 15


def test_a_kill_at_any_call_of_the_operating_system_leaves_the_one_before(folder, monkeypatch):
  """A write is broken off behind each of its calls, as by a kill: nothing is tidied up."""

  class Killed(BaseException):
    pass

  calls = {"mkdir": os.mkdir, "fsync": os.fsync, "rename": os.rename}
  moments, mesh = 0, make_mesh(1, 1, jax.devices()[:1])
  for killed_at in range(100):
    shutil.rmtree(folder, ignore_errors=True)
    snapshots, asked = saved(folder, 1, 2)
    count = iter(range(1000))

    def counted(call, count=count, killed_at=killed_at):
      def run(*args, **kwargs):
        if next(count) == killed_at:
          raise Killed
        return call(*args, **kwargs)

      return run

    with monkeypatch.context() as patch:
      for name, call in calls.items():
        patch.setattr(os, name, counted(call))
      snapshots.save(3, state(mesh, 3), {"step": 3})
      try:
        snapshots.wait()
      except Killed:
        moments += 1
      else:
        break
    again = Snapshots(folder)
    found, passed = again.restore(asked, again.steps(after=0))
    assert found.step in (2, 3) and not passed
    same(found.state, state(mesh, found.step))
  assert moments >= 10, moments


def test_a_disk_that_is_full_for_a_while_is_told_once(folder, monkeypatch):
  said = []
  snapshots, asked = saved(folder, 1, say=said.append)
  mesh = make_mesh(1, 1, jax.devices()[:1])
  write, full = snapshots_lib.write_parts, True

  def fails(where, parts):
    write(where, parts)
    if full:
      raise OSError(28, os.strerror(28))

  monkeypatch.setattr(snapshots_lib, "write_parts", fails)
  for step in (2, 3):
    snapshots.save(step, state(mesh, step), {})
  snapshots.wait()
  assert said == [
    f"no snapshot of step 2 could be written to {folder} (No space left on device); "
    "training goes on without"
  ]
  assert [f.name for f in folder.iterdir()] == ["000000001.0"]
  full = False
  snapshots.save(4, state(mesh, 4), {})
  snapshots.wait()
  assert snapshots.restore(asked, snapshots.steps(after=0))[0].step == 4 and len(said) == 1


def test_another_mesh_has_no_use_for_it_unless_the_shards_are_the_same(folder):
  snapshots, _ = saved(folder, 3, mesh=make_mesh(1, 4, jax.devices()[:4]))
  other = like(state(make_mesh(1, 2, jax.devices()[:2])))
  found, (sentence,) = snapshots.restore(other, [3])
  assert found is None
  assert (
    sentence == "process 0 lacks shards, of another mesh or half written: step 3 is passed over"
  )


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(CheckpointError, match=r"file/run cannot be made \(Not a directory\); name"):
    Snapshots(tmp_path / "file" / "run")


def test_a_lost_disk_costs_nothing_where_others_hold_the_same(tmp_path):
  alone = {"XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "2"}
  for code, out, err in side_by_side.ended("given.py", tmp_path, 2, **alone):
    assert code == 0, err
    assert out.splitlines()[-2:] == [
      "copied, 2, process 1 has no snapshot: step 2 is read from its replicas",
      "split, 1, process 1 has no snapshot: step 2 is passed over",
    ]
