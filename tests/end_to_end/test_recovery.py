"""Runs that keep snapshots are killed between two checkpoints, and lose no more than the steps
since the last one: they end as the one that never was, to the bit.
"""

import functools
import json
import os
import re
import shutil
import signal
import time

import numpy as np
import pytest
import tensorstore as ts
import tiny
from bad import flip, full_disk
from test_peers import FAULTY
from test_processes import free_port

from gemjax import config as c
from gemjax.checkpoint.snapshots import PARTIAL
from gemjax.checkpoint.streamed import StoredArrays
from gemjax.train.feed import Feed
from gemjax.train.loop import train
from gemjax.train.recovery import Recovery
from gemjax.train.workdir import CHECKPOINTS, RUN, SUMMARY, saved_steps

EVERY = 2


@pytest.fixture(scope="module")
def compiled(cache):
  """Nothing is even traced twice."""
  return cache / "snapshots"


def few_checkpoints(data, compiled, local, mesh=(1, 1)) -> c.Config:
  """And many snapshots."""
  config = tiny.get_config("logistic")
  config.data.path, config.compilation.cache = str(data), str(compiled)
  config.train.eval_every, config.mesh = 1.0, c.Mesh(data=mesh[0], model=mesh[1])
  # Tables are split, and rows of a batch already looked up when the one before it is saved.
  config.embedding.replicated_rows, config.embedding.lookup = 0, "ahead"
  config.checkpoint = c.Checkpoint(local=str(local), local_every=EVERY)
  return config


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, data, compiled):
  """Finished runs by mesh; one process gives the bits of several."""

  @functools.cache
  def of(*mesh):
    folder = tmp_path_factory.mktemp("unbroken")
    train(few_checkpoints(data, compiled, folder / "local", mesh), folder / "run")
    assert not list((folder / "local").iterdir())
    return folder / "run"

  return of


@pytest.fixture
def local(tmp_path):
  return tmp_path / "local"


@pytest.fixture
def kept(data, compiled, local):
  return few_checkpoints(data, compiled, local)


def snapshots(local) -> dict[int, set[int]]:
  """Step -> processes with a complete snapshot of it."""
  found: dict[int, set[int]] = {}
  for folder in local.glob("*/*"):
    step, _, process = folder.name.partition(".")
    if process.isdigit():
      found.setdefault(int(step), set()).add(int(process))
  return found


def arrays(workdir, step: int) -> dict[str, np.ndarray]:
  """Every array of a checkpoint by its path, whatever mesh wrote it."""
  base = f"file://{workdir / CHECKPOINTS / f'{step:09d}' / 'state'}/"
  keys = ts.KvStore.open({"driver": "ocdbt", "base": base}).result().list().result()
  names = [key.decode().removesuffix("/.zarray") for key in keys if key.endswith(b"/.zarray")]
  stored = StoredArrays(workdir / CHECKPOINTS, step)
  return {name: stored.read(name) for name in names}


def assert_same_end(workdir, unbroken) -> None:
  found, wanted = (json.loads((w / SUMMARY).read_text()) for w in (workdir, unbroken))
  for summary in (found, wanted):
    del summary["start_up_seconds"], summary["train"]["seconds"]
    del summary["train"]["examples_per_second"]
  assert found == wanted
  last = saved_steps(workdir)[-1]
  assert saved_steps(unbroken)[-1] == last
  found, wanted = arrays(workdir, last), arrays(unbroken, last)
  assert found.keys() == wanted.keys() and len(found) > 20
  assert [n for n in wanted if found[n].tobytes() != wanted[n].tobytes()] == []


class Broken(Exception):
  pass


def broken(monkeypatch, config, workdir, behind: int) -> None:
  """A start that fails with an error behind its `behind`-th step. It waits for checkpoints: until
  one is written there are no snapshots.
  """
  advance, save, asked = Feed.advance, Recovery.save, iter(range(1000))

  def fails(self):
    if next(asked) == behind:
      raise Broken
    return advance(self)

  def waits(self, *args, **kwargs):
    save(self, *args, **kwargs)
    self.checkpoints.wait()

  with monkeypatch.context() as patch, pytest.raises(Broken):
    patch.setattr(Feed, "advance", fails)
    patch.setattr(Recovery, "save", waits)
    train(config, workdir)


SLOW = [pytest.param(mode, marks=pytest.mark.slow) for mode in ("exact", "average")]


@pytest.mark.parametrize("mode", ["ahead", *SLOW])
def test_a_broken_run_goes_on_from_its_snapshot(
  mode, kept, unbroken, tmp_path, local, capsys, monkeypatch
):
  """Before the first checkpoint, and then between two; nothing is left in the end."""
  if mode != "ahead":
    kept.embedding.lookup = "exact"
  if mode == "average":
    kept.mesh = c.Mesh(data=2, model=2)
    kept.embedding.replicas, kept.embedding.average_every = "average", 5
    kept.checkpoint.local_every = 5
  if mode == "ahead":
    whole = unbroken(1, 1)
  else:
    whole = tmp_path / "unbroken"
    train(kept, whole)
  every, workdir = kept.checkpoint.local_every, tmp_path / "run"
  broken(monkeypatch, kept, workdir, behind=13)
  assert saved_steps(workdir) == [] and max(snapshots(local)) == 13 // every * every
  capsys.readouterr()
  broken(monkeypatch, kept, workdir, behind=33)
  assert (
    f"resuming from the local snapshot of step {13 // every * every}\n" in capsys.readouterr().out
  )
  saved, newest = saved_steps(workdir)[-1], max(snapshots(local))
  assert 0 < saved < newest == 13 // every * every + 33 // every * every
  train(kept, workdir)
  assert f"resuming from the local snapshot of step {newest}\n" in capsys.readouterr().out
  assert_same_end(workdir, whole)
  assert not list(local.iterdir())


def test_snapshots_of_another_life_do_not_count(kept, tmp_path, local, capsys, monkeypatch):
  """Where training begins anew for another config, or as its checkpoints were deleted."""
  workdir = tmp_path / "run"
  for change in ("config", "checkpoints"):
    broken(monkeypatch, kept, workdir, behind=5)
    assert snapshots(local)
    if change == "config":
      kept.train.seed = 1
    else:
      shutil.rmtree(workdir / CHECKPOINTS)
    capsys.readouterr()
    broken(monkeypatch, kept, workdir, behind=1)
    assert "resuming" not in capsys.readouterr().out
  assert json.loads((workdir / RUN).read_text())["life"] > 0


def test_none_is_taken_while_the_best_checkpoint_is_being_written(
  kept, tmp_path, local, capsys, monkeypatch
):
  """It would be missing in the end."""
  workdir = tmp_path / "run"
  from gemjax.train import recovery

  monkeypatch.setattr(recovery, "saved_steps", lambda path: [])
  broken(monkeypatch, kept, workdir, behind=40)
  (best,) = saved_steps(workdir)
  assert best < 40 - EVERY and max(snapshots(local)) < best


def test_a_full_disk_does_not_end_the_run(kept, unbroken, tmp_path, local, capsys, monkeypatch):
  advance, asked, limit = Feed.advance, iter(range(1000)), full_disk(5_000)

  def full(self):
    number = next(asked)
    if number == 3:
      limit.__enter__()
    elif number == 7:  # Before the first checkpoint, which would not fit either.
      limit.__exit__(None, None, None)
    return advance(self)

  monkeypatch.setattr(Feed, "advance", full)
  train(kept, tmp_path / "run")
  out = capsys.readouterr().out
  assert out.count("no snapshot of step") == 1
  assert re.search(rf"no snapshot of step [24] could be written to {local}", out)
  assert "(File too large); training goes on without\n" in out
  assert_same_end(tmp_path / "run", unbroken(1, 1))


def start_all(count, mesh, data, compiled, workdir, locals_, slow=True):
  env = {"PYTHONPATH": os.pathsep.join(map(str, (tiny.ROOT, FAULTY.parent)))}
  env |= {
    "JAX_NUM_PROCESSES": str(count), "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}"
  }  # fmt: skip
  flags = {
    "config": f"{FAULTY}:logistic", "workdir": workdir, "config__data__path": data,
    "config__mesh__data": mesh[0], "config__mesh__model": mesh[1],
    "config__compilation__cache": compiled, "config__train__eval_every": 1.0,
    "config__checkpoint__local_every": EVERY, "config__embedding__replicated_rows": 0,
    "config__embedding__lookup": "ahead",
  }  # fmt: skip
  faults = {"FAULT": "slow:0:1"} if slow else {}
  return [
    tiny.start(
      "train", env=env | faults | {"JAX_PROCESS_ID": str(i)}, **flags,
      config__checkpoint__local=locals_[i],
    )
    for i in range(count)
  ]  # fmt: skip


def kill_when(processes, holds) -> list[str]:
  """SIGKILL to all at a moment at which `holds`, and what each had said."""
  while True:
    assert all(p.poll() is None for p in processes), [p.communicate() for p in processes]
    if not holds():
      time.sleep(0.003)
      continue
    for process in processes:
      process.send_signal(signal.SIGSTOP)
    if holds():  # Still, now that nothing moves.
      break
    for process in processes:
      process.send_signal(signal.SIGCONT)
  for process in processes:
    process.kill()
  return [process.communicate(timeout=60)[0] for process in processes]


def expected(workdir, local, processes=1) -> str:
  """What the next start must say."""
  whole = [s for s, found in snapshots(local).items() if len(found) == processes]
  kind, step = max(
    ("local snapshot", max(whole)), ("checkpoint", max(saved_steps(workdir))), key=lambda x: x[1]
  )
  return f"resuming from the {kind} of step {step}\n"


def between(workdir, local, processes=1) -> bool:
  """Whether every process has a snapshot that is newer than a checkpoint."""
  saved = saved_steps(workdir)
  common = [s for s, found in snapshots(local).items() if len(found) == processes]
  return bool(saved and common) and max(common) > saved[-1]


def test_killed_between_checkpoints_and_while_a_snapshot_is_written(
  kept, unbroken, data, compiled, local, tmp_path, capsys
):
  workdir = tmp_path / "run"
  processes = start_all(1, (1, 1), data, compiled, workdir, [local])
  kill_when(processes, lambda: between(workdir, local))
  sentence = expected(workdir, local)
  assert "snapshot" in sentence
  processes = start_all(1, (1, 1), data, compiled, workdir, [local])
  writing = lambda: len(snapshots(local)) > 1 and bool(list(local.glob(f"*/*{PARTIAL}/*/arrays")))
  (out,) = kill_when(processes, writing)
  assert sentence in out, out
  sentence = expected(workdir, local)
  capsys.readouterr()
  train(kept, workdir)
  assert sentence in capsys.readouterr().out
  assert_same_end(workdir, unbroken(1, 1))
  assert not list(local.iterdir())


@pytest.fixture(scope="module")
def _killed(tmp_path_factory, data, compiled):
  folder = tmp_path_factory.mktemp("killed")
  workdir, local = folder / "run", folder / "local"
  processes = start_all(2, (1, 2), data, compiled, workdir, [local, local])
  two = lambda: (
    sum(len(found) == 2 and s > saved_steps(workdir)[-1] for s, found in snapshots(local).items())
    == 2
  )
  kill_when(processes, lambda: bool(saved_steps(workdir)) and two())
  return folder


@pytest.fixture
def killed(_killed, kept, tmp_path):
  """(workdir, local) of a run of two processes that were killed: two snapshots, one checkpoint."""
  shutil.copytree(_killed, tmp_path, dirs_exist_ok=True)
  kept.mesh = c.Mesh(data=1, model=2)
  return tmp_path / "run", tmp_path / "local"


def test_two_processes_go_on_from_the_snapshot_of_both(killed, unbroken, data, compiled):
  workdir, local = killed
  sentence = expected(workdir, local, processes=2)
  assert "snapshot" in sentence
  processes = start_all(2, (1, 2), data, compiled, workdir, [local, local], slow=False)
  (out, err), (other, _) = [p.communicate(timeout=300) for p in processes]
  assert [p.returncode for p in processes] == [0, 0], err
  assert sentence in out and "snapshot" not in other
  assert_same_end(workdir, unbroken(1, 2))
  assert not list(local.iterdir())


@pytest.mark.slow
def test_one_process_has_use_for_what_two_of_its_host_had(killed, kept, unbroken, capsys):
  workdir, local = killed
  sentence = expected(workdir, local, processes=2)
  train(kept, workdir)
  assert sentence in capsys.readouterr().out
  assert_same_end(workdir, unbroken(1, 2))


def test_another_mesh_goes_on_from_the_checkpoint(killed, kept, capsys):
  workdir, local = killed
  saved, (old, new) = saved_steps(workdir)[-1], sorted(snapshots(local))[-2:]
  kept.mesh, kept.train.patience = c.Mesh(data=1, model=1), 1
  train(kept, workdir)
  out = capsys.readouterr().out
  for step in (old, new):
    assert f"what process 0 has is of another mesh: step {step} is passed over\n" in out
  assert f"resuming from the checkpoint of step {saved}\n" in out


@pytest.mark.parametrize("hurt", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_corrupt_snapshot_is_passed_over(hurt, killed, kept, unbroken, capsys):
  """For the one before, and where that is corrupt as well for the checkpoint."""
  workdir, local = killed
  saved, newest = saved_steps(workdir)[-1], sorted(snapshots(local), reverse=True)
  files = [next(local.glob(f"*/{s:09d}.{s % 2}/state/arrays")) for s in newest[:hurt]]
  for file in files:
    flip(file)
  train(kept, workdir)
  out = capsys.readouterr().out
  for step, file in zip(newest, files):
    assert f"{file} is corrupt (its checksum differs): step {step} is passed over\n" in out
  kind, step = ("local snapshot", newest[1]) if hurt == 1 else ("checkpoint", saved)
  assert f"resuming from the {kind} of step {step}\n" in out
  assert_same_end(workdir, unbroken(1, 2))


@pytest.mark.slow
def test_a_host_that_lost_its_disk_is_given_what_the_others_hold(
  data, compiled, tmp_path, unbroken
):
  """Tables and weights are copied along `data`."""
  workdir, locals_ = tmp_path / "run", [tmp_path / "a", tmp_path / "b"]
  both = lambda: all(between(workdir, local) for local in locals_)
  kill_when(start_all(2, (2, 1), data, compiled, workdir, locals_), both)
  newest = max(snapshots(locals_[1]))
  for folder in locals_[1].glob("*/*"):
    if folder.name != f"{newest:09d}.1":
      shutil.rmtree(folder)
  shutil.rmtree(locals_[0])
  processes = start_all(2, (2, 1), data, compiled, workdir, locals_, slow=False)
  (out, err), _ = [p.communicate(timeout=300) for p in processes]
  assert [p.returncode for p in processes] == [0, 0], err
  assert f"process 0 has no snapshot: step {newest} is read from its replicas\n" in out
  assert f"resuming from the local snapshot of step {newest}\n" in out
  assert_same_end(workdir, unbroken(2, 1))
