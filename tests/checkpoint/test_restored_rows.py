"""Restoring takes a few times the memory of what a process is to hold, not that of the whole."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest
import restored_rows

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("large") / "checkpoints"
  restored_rows.save(folder)
  return folder


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_peak_memory_is_a_few_times_one_shard(count, folder):
  """The shard on its way and in its place, which is host memory as well here, and pieces."""
  if not pathlib.Path("/proc/self/clear_refs").exists():
    pytest.skip("only Linux tells a process its peak memory anew")
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  script = pathlib.Path(__file__).with_name("restored_rows.py")
  processes = [
    subprocess.Popen(
      [sys.executable, script, folder, address, str(count), str(index)],
      env=os.environ | {"PYTHONPATH": str(ROOT)},
      text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    for index in range(count)
  ]  # fmt: skip
  ended = [process.communicate(timeout=200) for process in processes]
  assert [process.returncode for process in processes] == [0] * count, ended
  found = [json.loads(out.splitlines()[-1]) for out, _ in ended]
  assert [one["bytes"] for one in found] == [192_000_000 // count] * count
  over = [one["peak"] / one["bytes"] for one in found]
  print(f"{count} processes: peaks of {', '.join(f'{x:.2f}' for x in over)} shards")
  assert max(over) < 3, over
