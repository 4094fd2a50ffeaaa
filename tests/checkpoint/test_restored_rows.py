"""Restoring takes a few times the memory of what a process is to hold, not that of the whole."""

import json
import pathlib

import pytest
import restored_rows
import side_by_side


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
  ended = side_by_side.ended("restored_rows.py", folder, count)
  assert [code for code, *_ in ended] == [0] * count, ended
  found = [json.loads(out.splitlines()[-1]) for _, out, _ in ended]
  assert [one["bytes"] for one in found] == [192_000_000 // count] * count
  over = [one["peak"] / one["bytes"] for one in found]
  print(f"{count} processes: peaks of {', '.join(f'{x:.2f}' for x in over)} shards")
  assert max(over) < 3, over
