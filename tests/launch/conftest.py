"""The launchers as processes, and a cluster made of this host."""

import os
import subprocess
import sys

import pytest
from paths import PATHS, ROOT

# Stands for the Python of a host: prints the place that the real code resolves, and the command.
STUB = f"""#!{sys.executable}
import os, sys
sys.path[:0] = {PATHS.split(os.pathsep)!r}
from gemjax.parallel.place import resolve
place = resolve(os.environ)
print(place.index, place.count, place.hosts[place.index] if place.hosts else "-",
      os.environ.get("CUDA_VISIBLE_DEVICES"), place.devices, *sys.argv[1:], flush=True)
"""


@pytest.fixture
def stub(tmp_path):
  file = tmp_path / "stub"
  file.write_text(STUB)
  file.chmod(0o755)
  return file


@pytest.fixture
def launch():
  """Runs launch/NAME.py; (exit code, stdout, stderr)."""

  def launch(name, *flags, **env):
    done = subprocess.run(
      [sys.executable, str(ROOT / "launch" / f"{name}.py"), *map(str, flags)],
      env=os.environ | {"PYTHONPATH": PATHS} | env,
      cwd=ROOT, text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr

  return launch
