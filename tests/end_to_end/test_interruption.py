"""A run that is killed, however often and whenever, ends as the one that never was: to the bit."""

import functools
import json
import pathlib
import random
import signal
import time

import jax
import numpy as np
import pytest
import tiny

from gemjax.checkpoint import Checkpoints
from gemjax.checkpoint.checkpoints import TEMPORARY
from gemjax.train.workdir import CHECKPOINTS, SUMMARY

STEPS_AN_EPOCH = 31  # Of tiny.py, an evaluation every eighth.


def start(workdir, data, cache, epochs=3):
  return tiny.start(
    "train", cache=cache, config=tiny.FILE, workdir=workdir, config__data__path=data,
    config__train__epochs=epochs, config__checkpoint__every=3,
  )  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, data, cache):
  """Workdirs of finished runs, by their epochs."""

  @functools.cache
  def of(epochs):
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    process = start(workdir, data, cache, epochs)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return workdir

  return of


def arrays(workdir: pathlib.Path, step: int) -> dict[str, np.ndarray]:
  """Every array of a checkpoint by its path, as it lies on disk."""
  import orbax.checkpoint as ocp

  with ocp.StandardCheckpointer() as checkpointer:
    tree = checkpointer.restore(workdir / CHECKPOINTS / f"{step:09d}" / "state")
  return {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree.leaves_with_path(tree)}


def assert_same_end(workdir: pathlib.Path, unbroken: pathlib.Path) -> None:
  ours, theirs = (Checkpoints(w / CHECKPOINTS, read_only=True) for w in (workdir, unbroken))
  assert ours.steps == theirs.steps
  for step in ours.steps:
    notes, wanted = (c.notes(step) | {"seconds": None} for c in (ours, theirs))
    assert notes == wanted
    found, wanted = arrays(workdir, step), arrays(unbroken, step)
    assert found.keys() == wanted.keys() and len(found) > 50
    for name in wanted:
      assert found[name].dtype == wanted[name].dtype, name
      assert found[name].tobytes() == wanted[name].tobytes(), f"{name} at step {step}"
  found, wanted = (json.loads((w / SUMMARY).read_text()) for w in (workdir, unbroken))
  assert found["start_up_seconds"]["imports"] > 0
  for summary in (found, wanted):
    del summary["start_up_seconds"], summary["train"]["seconds"]
    del summary["train"]["examples_per_second"]
  assert found == wanted
  assert not list((workdir / CHECKPOINTS).glob(f"*{TEMPORARY}*"))


def await_line(process, text: str) -> str:
  for line in process.stdout:
    if text in line:
      return line
  pytest.fail(f"no {text!r}; {process.stderr.read()}")


def saving(workdir, process) -> bool:
  """Waits for a checkpoint that is being written."""
  while process.poll() is None:
    if list((workdir / CHECKPOINTS).glob(f"*{TEMPORARY}*")):
      return True
    time.sleep(0.001)
  return False


# How often in start-up, while it trains and evaluates, while it saves; the last two wait for an
# evaluation each.
@pytest.mark.parametrize(
  ("counts", "epochs"), [((1, 1, 1), 3), pytest.param((2, 5, 3), 8, marks=pytest.mark.slow)]
)
def test_killed_at_random_moments(counts, epochs, unbroken, data, cache, tmp_path):
  workdir, rng = tmp_path / "run", random.Random(0)
  moments = np.repeat(["start", "train", "save"], counts).tolist()
  rng.shuffle(moments)
  completed = []
  for moment in moments:
    process = start(workdir, data, cache, epochs)
    if moment == "start":
      time.sleep(rng.uniform(0, 5))
    else:
      await_line(process, "valid")
      time.sleep(rng.uniform(0, 0.2))
      if moment == "save":
        assert saving(workdir, process)
    assert process.poll() is None, "it ended before it was killed: train longer"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    made = (workdir / CHECKPOINTS).exists()
    steps = Checkpoints(workdir / CHECKPOINTS, read_only=True).steps if made else []
    completed.append(steps[-1] if steps else 0)
    process.stdout.close(), process.stderr.close()
  assert completed == sorted(completed), "a complete checkpoint was lost"
  assert 0 < completed[-1] < epochs * STEPS_AN_EPOCH, completed
  process = start(workdir, data, cache, epochs)
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  assert "resuming from the checkpoint of step" in out
  assert_same_end(workdir, unbroken(epochs))


def test_sigterm_and_ctrl_c_save_or_lose_nothing(unbroken, data, cache, tmp_path):
  workdir = tmp_path / "run"
  process = start(workdir, data, cache)
  await_line(process, "valid")
  process.terminate()
  error = tiny.sentence(process, 143)
  step = int(error.split("after step ")[1].split(" of")[0])
  assert 0 < step < 3 * STEPS_AN_EPOCH and "the same command goes on from there" in error
  checkpoints = Checkpoints(workdir / CHECKPOINTS, read_only=True)
  assert checkpoints.steps[-1] == step and not (workdir / SUMMARY).exists()

  process = start(workdir, data, cache)
  await_line(process, f"resuming from the checkpoint of step {step}")
  await_line(process, "valid")
  process.send_signal(signal.SIGINT)
  assert "interrupted; the same command goes on" in tiny.sentence(process, 130)
  assert checkpoints.steps[-1] > step

  process = start(workdir, data, cache)
  _, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  assert_same_end(workdir, unbroken(3))


def test_sigterm_before_the_first_step_leaves_no_half_made_data(tmp_path):
  process = tiny.start(
    "train", config=f"{tiny.FILE}:fm", workdir=tmp_path / "run", config__data__path="demo"
  )
  await_line(process, "simulating")
  time.sleep(0.2)
  process.terminate()
  assert "SIGTERM before the first step" in tiny.sentence(process, 143)
  assert not (tmp_path / "run").exists()


def test_sigkill_while_the_data_is_made_is_mended_by_the_next_start(tmp_path, cache):
  flags = {
    "config": f"{tiny.FILE}:fm", "workdir": tmp_path / "run", "config__data__path": "demo",
    "config__train__steps": 2, "config__data__batch_size": 4096,
    "config__data__demo_examples": 40_000,
  }  # fmt: skip
  process = tiny.start("train", **flags)
  await_line(process, "simulating")
  while not (tmp_path / "run" / "data.partial").exists():
    time.sleep(0.001)
  process.kill()
  process.wait()
  assert [f.name for f in (tmp_path / "run").glob("data*")] == ["data.partial"]
  process.stdout.close(), process.stderr.close()
  process = tiny.start("train", cache=cache, **flags)
  _, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  assert [f.name for f in (tmp_path / "run").glob("data*")] == ["data"]
