"""Processes that keep snapshots are killed for real, and lose no more than the steps since the last
one: they end as a run that never was, to the bit.
"""

import os
import shutil
import signal
import time

import pytest
import tiny
from bad import flip
from snapshotting import EVERY, assert_same_end, snapshots
from test_peers import FAULTY
from test_processes import free_port

from gemjax import config as c
from gemjax.checkpoint.snapshots import PARTIAL
from gemjax.train.loop import train
from gemjax.train.workdir import saved_steps


def start_all(count, mesh, data, compiled, workdir, locals_, fault="slow:0:1"):
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
  return [
    tiny.start(
      "train", env=env | {"FAULT": fault} | {"JAX_PROCESS_ID": str(i)}, **flags,
      config__checkpoint__local=locals_[i],
    )
    for i in range(count)
  ]  # fmt: skip


def kill_when(processes, holds) -> list[str]:
  """SIGKILL to all at a moment at which `holds`, and what each had said."""
  while True:
    assert all(p.poll() is None for p in processes), [p.communicate() for p in processes]
    if not holds():
      time.sleep(0.01)
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


def newer(workdir, local, processes=1) -> list[int]:
  """Steps of the snapshots that all have, newer than the last checkpoint, if there is one."""
  saved = saved_steps(workdir)
  whole = [s for s, found in snapshots(local).items() if len(found) == processes]
  return sorted(s for s in whole if saved and s > saved[-1])


@pytest.mark.parametrize("when", ["writing", pytest.param("between", marks=pytest.mark.slow)])
def test_killed_as_it_writes_a_snapshot_or_between_checkpoints(
  when, kept, unbroken, data, compiled, local, tmp_path, capsys
):
  workdir = tmp_path / "run"
  if when == "writing":
    (process,) = start_all(1, (1, 1), data, compiled, workdir, [local], fault="half:0:3")
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    (half,) = local.glob(f"*/*{PARTIAL}")
    assert snapshots(local) == {2 * EVERY: {0}} and half.name.startswith(f"{3 * EVERY:09d}")
    sentence = f"resuming from the local snapshot of step {2 * EVERY}\n"
  else:
    processes = start_all(1, (1, 1), data, compiled, workdir, [local])
    kill_when(processes, lambda: newer(workdir, local))
    sentence = f"resuming from the local snapshot of step {newer(workdir, local)[-1]}\n"
  train(kept, workdir)
  assert sentence in capsys.readouterr().out
  assert_same_end(workdir, unbroken(1, 1))
  assert not list(local.iterdir())


@pytest.fixture(scope="module")
def _killed(tmp_path_factory, data, compiled):
  folder = tmp_path_factory.mktemp("killed")
  workdir, local = folder / "run", folder / "local"
  processes = start_all(2, (1, 2), data, compiled, workdir, [local, local])
  kill_when(processes, lambda: len(newer(workdir, local, processes=2)) == 2)
  return folder


@pytest.fixture
def killed(_killed, tmp_path):
  """(workdir, local) of two processes that were killed: two snapshots of both, one checkpoint."""
  shutil.copytree(_killed, tmp_path, dirs_exist_ok=True)
  return tmp_path / "run", tmp_path / "local"


@pytest.mark.slow
@pytest.mark.parametrize("hurt", [False, True])
def test_two_processes_go_on_from_the_last_sound_snapshot_of_both(
  hurt, killed, unbroken, data, compiled
):
  workdir, local = killed
  older, newest = newer(workdir, local, processes=2)
  file = next(local.glob(f"*/{newest:09d}.1/state/arrays"))
  if hurt:
    flip(file)
  processes = start_all(2, (1, 2), data, compiled, workdir, [local, local], fault="")
  (out, err), (other, _) = [p.communicate(timeout=300) for p in processes]
  assert [p.returncode for p in processes] == [0, 0], err
  sentence = f"{file} is corrupt (its checksum differs): step {newest} is passed over\n"
  assert (sentence in out) == hurt and str(file) not in other
  assert f"resuming from the local snapshot of step {older if hurt else newest}\n" in out
  assert "snapshot" not in other
  assert_same_end(workdir, unbroken(1, 2))
  assert not list(local.iterdir())


@pytest.mark.slow
def test_one_process_has_use_for_what_two_of_its_host_had(killed, kept, unbroken, capsys):
  workdir, local = killed
  kept.mesh, newest = c.Mesh(data=1, model=2), newer(workdir, local, processes=2)[-1]
  train(kept, workdir)
  assert f"resuming from the local snapshot of step {newest}\n" in capsys.readouterr().out
  assert_same_end(workdir, unbroken(1, 2))
  assert not list(local.iterdir())  # Also of the process that is no more.


@pytest.mark.slow
def test_a_host_that_lost_its_disk_is_given_what_the_others_hold(
  data, compiled, tmp_path, unbroken
):
  """Tables and weights are copied along `data`."""
  workdir, locals_ = tmp_path / "run", [tmp_path / "a", tmp_path / "b"]
  both = lambda: all(newer(workdir, local) for local in locals_)
  kill_when(start_all(2, (2, 1), data, compiled, workdir, locals_), both)
  newest = max(snapshots(locals_[1]))
  for folder in locals_[1].glob("*/*"):
    if folder.name != f"{newest:09d}.1":
      shutil.rmtree(folder)
  shutil.rmtree(locals_[0])
  processes = start_all(2, (2, 1), data, compiled, workdir, locals_, fault="")
  (out, err), _ = [p.communicate(timeout=300) for p in processes]
  assert [p.returncode for p in processes] == [0, 0], err
  assert f"process 0 has no snapshot: step {newest} is read from its replicas\n" in out
  assert f"resuming from the local snapshot of step {newest}\n" in out
  assert_same_end(workdir, unbroken(2, 1))
