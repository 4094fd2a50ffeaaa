"""Of several processes one dies, stops, stalls or fails: all stop by its name, and go on."""

import os
import pathlib
import re
import signal
import sys

import compiled_quickly
import pytest
import tiny
from test_interruption import await_line
from test_processes import free_port, start_all

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


def test_a_first_process_that_nobody_reaches(data, tmp_path):
  address = f"127.0.0.1:{free_port()}"
  process = tiny.start(
    "train", config=tiny.FILE, workdir=tmp_path / "run", config__data__path=data, join_seconds=1,
    env={
      "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1",
    },
  )  # fmt: skip
  error = tiny.sentence(process, 1)
  assert f"cannot reach the first process at {address} within 1 s (Connection refused)" in error
  assert not (tmp_path / "run").exists()


def test_processes_that_are_missing(data, tmp_path):
  process = tiny.start(
    "train", config=tiny.FILE, workdir=tmp_path / "run", config__data__path=data, join_seconds=1,
    env={
      "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "3",
      "JAX_PROCESS_ID": "0", "GEMJAX_HOSTS": "alpha,beta,gamma",
    },
  )  # fmt: skip
  out, err = process.communicate(timeout=100)
  missing = "2 of 3 processes are missing: rank 1 (beta), rank 2 (gamma)"
  assert process.returncode == 1
  assert err.splitlines()[-1].startswith(f"error: after 1 s {missing}; are they started"), err
  assert out.startswith("rank 0 (") and " of 3 by JAX_*: the first is at 127.0.0.1:" in out
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_sigterm_to_the_launcher_saves_and_the_same_command_goes_on(data, cache, tmp_path):
  workdir = tmp_path / "run"
  command = [
    "local", "--processes=2", "--", sys.executable, "launch/train.py", f"--config={tiny.FILE}",
    f"--workdir={workdir}", f"--config.data.path={data}", "--config.mesh.model=2",
    "--config.train.epochs=4",
  ]  # fmt: skip
  env = {"XLA_FLAGS": compiled_quickly.XLA_FLAGS, "JAX_COMPILATION_CACHE_DIR": str(cache)}
  paths = {"PYTHONPATH": os.pathsep.join(map(str, (tiny.ROOT, tiny.ROOT / "launch")))}
  env |= tiny.CACHE_ALL | paths
  process = tiny.start_command(command, env=env)
  await_line(process, "valid")
  process.terminate()
  out, err = process.communicate(timeout=200)
  assert process.returncode == 143, (out, err)
  ended = sorted(re.findall(r"\[(\d)\] error: stopped by SIGTERM after step (\d+)", err))
  assert [rank for rank, _ in ended] == ["0", "1"] and len({step for _, step in ended}) == 1, err
  assert "stops;" not in err  # Nobody was stopped by another.
  step = int(ended[0][1])
  assert Checkpoints(workdir / CHECKPOINTS, read_only=True).steps[-1] == step
  out, err = tiny.start_command(command, env=env).communicate(timeout=200)
  assert f"[0] resuming from the checkpoint of step {step}" in out, err
  assert (workdir / SUMMARY).exists()
