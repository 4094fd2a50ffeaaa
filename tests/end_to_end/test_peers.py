"""Of several processes one dies, stops, stalls or fails: all stop by its name, and go on."""

import os
import pathlib
import re
import signal

import pytest
import tiny
from test_processes import start_all

from gemjax.checkpoint import Checkpoints
from gemjax.train.workdir import CHECKPOINTS, SUMMARY

FAULTY = pathlib.Path(__file__).parent / "faulty.py"
STALL_SECONDS = 25


def run(count, cache, data, workdir, fault=None):
  paths = os.pathsep.join(map(str, (tiny.ROOT, FAULTY.parent)))
  env = {"PYTHONPATH": paths} | ({"FAULT": fault} if fault else {})
  return start_all(
    count, cache, env=env, config=FAULTY, workdir=workdir,
    config__data__path=data, config__mesh__data=1, config__mesh__model=count,
    config__checkpoint__every=4, stall_seconds=STALL_SECONDS if fault else 600,
  )  # fmt: skip


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
  ("kind", "rank"),
  [
    ("kill", 1),
    pytest.param("kill", 0, marks=SLOW),
    pytest.param("sleep", 0, marks=SLOW),
    pytest.param("sleep", 1, marks=SLOW),
    pytest.param("stop", 0, marks=SLOW),
    pytest.param("stop", 1, marks=SLOW),
    pytest.param("raise", 0, marks=SLOW),
    pytest.param("raise", 1, marks=SLOW),
  ],
)
def test_all_stop_by_its_name_and_the_same_command_goes_on(kind, rank, data, cache, tmp_path):
  workdir = tmp_path / "run"
  processes = run(2, cache, data, workdir, f"{kind}:{rank}:22")
  other, faulty = processes[1 - rank], processes[rank]
  # Two minutes hold start-up, the stall and compilation; JAX alone would take 100 s from the fault.
  _, err = other.communicate(timeout=120)
  # Where the first process is gone, JAX aborts those that it coordinated, and may be the faster.
  aborted = rank == 0 and kind in ("kill", "raise") and other.returncode == -signal.SIGABRT
  assert other.returncode == 1 or aborted, err
  verdict = {
    "kill": "died, last in phase",
    "sleep": f"stalled for {STALL_SECONDS} s in phase 'batch behind step 22'",
    "stop": f"has been silent for {STALL_SECONDS} s, last in phase",
    "raise": "failed in phase 'batch behind step 22': a batch cannot be read: the disk is gone",
  }[kind]
  name = rf"error: rank {rank} \([^)]+\) {re.escape(verdict)}"
  assert aborted or re.search(name, err), err
  assert aborted or "the same command goes on from the last checkpoint" in err
  if kind == "stop":
    faulty.kill()
  _, err = faulty.communicate(timeout=60)
  code = -signal.SIGKILL if kind in ("kill", "stop") else 1
  assert faulty.returncode == code, err
  if kind == "raise":
    assert err == "error: a batch cannot be read: the disk is gone\n"
  step = Checkpoints(workdir / CHECKPOINTS, read_only=True).steps[-1]
  assert 8 <= step < 22
  ended = [(*p.communicate(timeout=240), p.returncode) for p in run(2, cache, data, workdir)]
  assert [code for _, _, code in ended] == [0, 0], ended
  assert f"resuming from the checkpoint of step {step}" in ended[0][0]
  assert (workdir / SUMMARY).exists()
