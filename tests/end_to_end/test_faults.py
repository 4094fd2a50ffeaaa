"""Faults of disk, files and mesh in runs of several processes: all end, each with one sentence that
names what to mend, and the same command then goes on.
"""

import json
import os
import shutil

import pytest
import tiny
from bad import flip, truncate
from test_peers import FAULTY
from test_processes import ROWS_SPLIT, start_all

from gemjax.checkpoint import Checkpoints
from gemjax.checkpoint.checkpoints import REMOVED, TEMPORARY
from gemjax.train.workdir import CHECKPOINTS, LOCK, SUMMARY

SLOW = pytest.mark.slow


# The programs of test_peers.py, and compiled once with them.
def start(cache, data, workdir, fault=None, count=2, **flags):
  env = {"PYTHONPATH": os.pathsep.join(map(str, (tiny.ROOT, FAULTY.parent)))}
  env |= {"FAULT": fault} if fault else {}
  return start_all(
    count, cache, env=env,
    **{
      "config": FAULTY, "workdir": workdir, "config__data__path": data,
      "config__mesh__data": 1, "config__mesh__model": count, "config__checkpoint__every": 4,
    } | flags,
  )  # fmt: skip


def end(processes, code: int) -> list[tuple[str, str]]:
  """(stdout, stderr) of processes that must all end with `code`; of an error one line each."""
  ended = [p.communicate(timeout=300) for p in processes]
  assert [p.returncode for p in processes] == [code] * len(processes), ended
  for _, err in ended:
    assert code == 0 or (err.startswith("error: ") and err.count("error: ") == 1), err
  return ended


def steps(workdir) -> list[int]:
  return Checkpoints(workdir / CHECKPOINTS, read_only=True).steps


def half_written(workdir) -> list:
  return [
    f for f in workdir.rglob("*") if any(m in f.name for m in (TEMPORARY, REMOVED, "partial"))
  ]


@pytest.fixture(scope="module")
def _finished(tmp_path_factory, data, cache):
  workdir = tmp_path_factory.mktemp("finished") / "run"
  end(start(cache, data, workdir), 0)
  return workdir


@pytest.fixture
def finished(_finished, tmp_path):
  return shutil.copytree(_finished, tmp_path / "run")


def shard(workdir, step: int, process: int):
  """The file of a checkpoint in which most of what a process wrote lies."""
  folder = workdir / CHECKPOINTS / f"{step:09d}" / "state" / f"ocdbt.process_{process}" / "d"
  return max(folder.iterdir(), key=lambda f: f.stat().st_size)


@SLOW
def test_a_corrupt_shard_is_passed_over_by_all(finished, data, cache):
  """Both processes go on from the checkpoint before, to the bits of the run that was never hurt."""
  wanted = json.loads((finished / SUMMARY).read_text())
  *_, sound, last = steps(finished)
  file = shard(finished, last, process=1)
  flip(file)
  (out, _), (other, _) = end(start(cache, data, finished), 0)
  sentence = f"{file} is corrupt (its checksum differs): step {last} is set aside as "
  assert f"{sentence}{last:09d}.corrupt-1, and training goes on from step {sound}\n" in out
  assert f"resuming from the checkpoint of step {sound}\n" in out and "corrupt" not in other
  found = json.loads((finished / SUMMARY).read_text())
  assert (found["test"], found["valid"]) == (wanted["test"], wanted["valid"])
  assert steps(finished)[-1] == last and not half_written(finished)


@SLOW
def test_no_sound_checkpoint_ends_all(finished, data, cache):
  hurt = steps(finished)
  files = [shard(finished, step, process=step % 2) for step in hurt]
  contents = [file.read_bytes() for file in files]
  for file in files:
    truncate(file)
  for _, err in end(start(cache, data, finished), 1):
    assert f"{files[-1]} is truncated, and no other of the steps {hurt} is sound" in err
    assert f"delete {finished / CHECKPOINTS} to train anew" in err
  assert steps(finished) == hurt
  for file, content in zip(files, contents):
    file.write_bytes(content)  # As from a copy.
  end(start(cache, data, finished), 0)


@SLOW
@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_is_full_for_one_ends_all(rank, data, cache, tmp_path):
  workdir = tmp_path / "run"
  processes = start(cache, data, workdir, f"full:{rank}:10")
  (_, err), (_, told) = (processes[i].communicate(timeout=300) for i in (rank, 1 - rank))
  assert processes[rank].returncode == 1 and err.startswith("error: "), (err, told)
  assert err.count("error: ") == 1 and "failed" in err and "File too large" in err, err
  assert "free the disk, then the same command goes on from there" in err
  code = processes[1 - rank].returncode
  assert code == 1 and f"error: rank {rank} (" in told and "goes on" in told, (code, told)
  last = steps(workdir)[-1]
  assert last in (4, 8)  # The save of step 8 may still be writing when the disk fills.
  (out, _), _ = end(start(cache, data, workdir), 0)
  assert f"resuming from the checkpoint of step {last}\n" in out
  assert (workdir / SUMMARY).exists() and not half_written(workdir)


@SLOW
def test_a_mesh_of_other_devices_ends_all(data, tmp_path):
  workdir = tmp_path / "run"
  for _, err in end(start(None, data, workdir, config__mesh__data=3, config__mesh__model=1), 1):
    assert "config.mesh is data 3 x model 1 = 3 devices, but there are 2" in err
  # Where the other one was faster, the first is stopped with its lock in the folder.
  assert not workdir.exists() or os.listdir(workdir) == [LOCK]


@SLOW
def test_a_mesh_that_the_tables_cannot_have(finished, data, cache):
  before = steps(finished)
  process = tiny.start(
    "train", cache=cache, config=FAULTY, workdir=finished, config__data__path=data,
    config__mesh__data=1, config__mesh__model=5, config__checkpoint__every=4,
    config__data__batch_size=50, **ROWS_SPLIT,
    env={
      "PYTHONPATH": os.pathsep.join(map(str, (tiny.ROOT, FAULTY.parent))),
      "JAX_NUM_CPU_DEVICES": "5",
    },
  )  # fmt: skip
  error = tiny.sentence(process, 1)
  assert "config.mesh.model" in error and steps(finished) == before
  end(start(cache, data, finished), 0)
