"""Conversions stream: they hold less than two of the largest array."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_peak_memory_is_below_two_of_the_largest_array(tmp_path):
  """Measured in a process of its own, where the state is three arrays of 96 MB."""
  pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[convert]'")
  if not pathlib.Path("/proc/self/clear_refs").exists():
    pytest.skip("only Linux tells a process its peak memory anew")
  done = subprocess.run(
    [sys.executable, pathlib.Path(__file__).with_name("peak.py"), tmp_path],
    capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-4000:]
  over = json.loads(done.stdout.splitlines()[-1])
  assert all(ratio < 2 for ratio in over.values()), over
