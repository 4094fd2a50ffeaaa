"""Savers and restorers are killed at random moments: no checkpoint is lost or half-read."""

import multiprocessing
import os
import random
import signal
import time

import pytest
import saver

from gemjax.checkpoint import Checkpoints


def lines(diary) -> list[str]:
  return diary.read_text().splitlines() if diary.exists() else []


FIFTIES = [pytest.param(seed, 50, marks=pytest.mark.slow) for seed in (1, 2, 3, 4)]


@pytest.mark.parametrize(("seed", "kills"), [(0, 10), *FIFTIES])
def test_nothing_is_lost_or_half_read(seed, kills, tmp_path):
  """Half of the kills fall into restoring, half into saving; a process is forked with its imports
  done, before JAX starts in it.
  """
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(["gemjax.checkpoint"])  # Seconds of imports.
  folder, diary, rng = tmp_path / "checkpoints", tmp_path / "diary", random.Random(seed)
  checked, fell = 0, {"restoring": 0, "saving": 0, "saved": 0, "restored": 0}
  for kill in range(kills):
    before = len(lines(diary))
    process = context.Process(target=saver.quiet_work, args=(folder, diary))
    process.start()
    phase = "restoring" if kill % 2 else "saving"
    reached = lambda phase=phase, before=before: any(
      line.startswith(phase) for line in lines(diary)[before:]
    )
    while not reached() and process.is_alive():
      time.sleep(0.001)
    # A restore may be over in tens of ms: half of its kills come before 18 ms.
    time.sleep(10 ** rng.uniform(-3, -0.5) if phase == "restoring" else rng.uniform(0, 1))
    assert process.is_alive(), lines(diary)[-1]
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    diaries = lines(diary)
    assert not [line for line in diaries if line.startswith("WRONG")]
    fell[diaries[-1].split()[0]] += 1
    saved = max((int(line.split()[1]) for line in diaries if line.startswith("saved")), default=0)
    steps = Checkpoints(folder, read_only=True).steps if folder.exists() else []
    assert max(steps, default=0) >= saved, "a checkpoint was lost"
    for step in steps:
      found = Checkpoints(folder, read_only=True).restore(saver.like(), step)
      assert not saver.wrong(found.state, step) and found.notes == {"step": step}
      checked += 1
  print(f"{kills} kills, the last line before: {fell}; {checked} checkpoints read, all sound")
  assert saved > 0 and fell["restoring"] and fell["saving"]
