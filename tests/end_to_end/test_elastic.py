"""A run goes on with another number of processes and another mesh: the losses of one process."""

import signal

import numpy as np
import pytest
import tiny
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c
from test_interruption import await_line
from test_processes import start_all

from gemjax.checkpoint import Checkpoints
from gemjax.train.workdir import CHECKPOINTS

STEPS = 48
MESHES = {1: (1, 1), 2: (2, 1), 4: (2, 2)}


def run(count, cache, data, workdir):
  """`count` processes, a device each. Tables are not rounded by drawn bits, and rates are low:
  other meshes add in another order, and what rounding parts every step carries further.
  """
  mesh = MESHES[count]
  env = {} if count > 1 else {"JAX_NUM_PROCESSES": "1"}
  return start_all(
    count, cache, env=env, config=tiny.FILE, workdir=workdir, config__data__path=data,
    config__mesh__data=mesh[0], config__mesh__model=mesh[1], config__train__steps=STEPS,
    config__train__log_every=1, config__checkpoint__every=2, config__embedding__dtype="float32",
    config__embedding__replicated_rows=0, config__train__eval_every=0.25,
    config__embedding__learning_rate=0.03, config__optimizer__learning_rate=0.001,
  )  # fmt: skip


def losses(workdir) -> dict[int, float]:
  """Step -> loss before it, of the last start that took the step."""
  found = {}
  for file in sorted((workdir / "tensorboard").iterdir(), key=lambda f: f.stat().st_mtime):
    blob, at = file.read_bytes(), 0
    while at < len(blob):
      length = int.from_bytes(blob[at : at + 8], "little")
      record = blob[at + 12 : at + 12 + length]
      at += 16 + length
      if len(record) < length:
        break  # Killed while it wrote.
      crc = int.from_bytes(blob[at - 4 : at], "little")
      assert crc == masked_crc32c(record)
      event = event_pb2.Event.FromString(record)
      for value in event.summary.value:
        if value.tag == "train/loss":
          found[event.step] = value.simple_value
  return found


@pytest.mark.slow
def test_two_processes_then_four_then_one(data, cache, tmp_path):
  (alone,) = run(1, cache, data, tmp_path / "alone")
  _, err = alone.communicate(timeout=300)
  assert alone.returncode == 0, err
  workdir, steps = tmp_path / "run", [0]
  for count, killed in ((2, 16), (4, 32)):
    processes = run(count, cache, data, workdir)
    await_line(processes[0], f" {killed}/{STEPS}  valid buy")
    for process in processes:
      process.send_signal(signal.SIGKILL)
    for process in processes:
      process.communicate(timeout=60)
    steps.append(Checkpoints(workdir / CHECKPOINTS, read_only=True).steps[-1])
  assert 0 < steps[1] < steps[2] < STEPS - 2, steps
  (last,) = run(1, cache, data, workdir)
  out, err = last.communicate(timeout=300)
  assert last.returncode == 0, err
  assert f"resuming from the checkpoint of step {steps[2]}" in out
  found, wanted = losses(workdir), losses(tmp_path / "alone")
  assert sorted(found) == sorted(wanted) == list(range(1, STEPS + 1))
  apart = max(abs(found[step] / wanted[step] - 1) for step in wanted)
  print(f"checkpoints resumed from {steps[1:]}, losses at most {apart:.1e} apart")
  np.testing.assert_allclose(apart, 0, atol=1e-5)
