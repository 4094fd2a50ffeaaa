"""The tiny config whose training fails on purpose: FAULT=KIND:RANK:BATCH in the environment.

The process of that rank, asked for that batch, is killed, is stopped, sleeps for ever, raises,
finds its disk full from then on, or is slow from then on. KIND half: it is killed with half of
the snapshot of that number written.
"""

import os
import resource
import signal
import time

import tiny


def get_config(model: str = "wukong"):
  if fault := os.environ.get("FAULT"):
    kind, rank, batch = fault.split(":")
    if os.environ.get("JAX_PROCESS_ID") == rank:
      _inject(kind, int(batch))
  return tiny.get_config(model)


def _inject(kind: str, batch: int) -> None:
  if kind == "half":
    return _write_half(batch)
  from gemjax.train.feed import Feed

  advance, asked = Feed.advance, iter(range(1, 1_000_000))

  def faulty(self):
    number = next(asked)
    if kind == "slow" and number >= batch:
      time.sleep(0.05)
    elif number == batch:
      print(f"fault: {kind}", flush=True)
      if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
      elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
      elif kind == "sleep":
        time.sleep(10_000)
      elif kind == "full":  # Less than a process writes of the state, more than anything else.
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.RLIM_INFINITY))
      else:
        raise OSError("a batch cannot be read: the disk is gone")
    return advance(self)

  Feed.advance = faulty


def _write_half(number: int) -> None:
  from gemjax.checkpoint import snapshots

  write, asked = snapshots.write_parts, iter(range(1, 1_000_000))

  def half(folder, parts):
    if next(asked) < number:
      return write(folder, parts)
    write(folder, dict(list(parts.items())[: len(parts) // 2]))
    os.kill(os.getpid(), signal.SIGKILL)

  snapshots.write_parts = half
