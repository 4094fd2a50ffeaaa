"""Binaries set up the process before JAX is imported, and the CPU is enough."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
BINARIES = ("train", "evaluate", "benchmark")


def run(code: str, *path: pathlib.Path, **env: str) -> subprocess.CompletedProcess:
  paths = os.pathsep.join(map(str, [*path, ROOT, ROOT / "launch"]))
  kept = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
  return subprocess.run(
    [sys.executable, "-c", code], env=kept | {"PYTHONPATH": paths} | env, cwd=ROOT, text=True,
    capture_output=True, timeout=300,
  )  # fmt: skip


@pytest.mark.parametrize("binary", BINARIES)
def test_jax_is_not_imported_before_the_process_is_set_up(binary):
  code = f"""
import sys
import gemjax.parallel.process as process
process.set_up_process = lambda: sys.exit("set up" + " after jax" * ("jax" in sys.modules))
sys.argv = ["{binary}"]
import runpy
runpy.run_path("launch/{binary}.py", run_name="__main__")
"""
  assert run(code).stderr.strip() == "set up"


@pytest.fixture
def wheels(tmp_path):
  """A CUDA plugin that does what jax-cuda12-plugin 0.10.2 does where there is no driver."""
  for name in ("jax_cuda12_plugin", "jax_plugins/xla_cuda12"):
    (tmp_path / name).mkdir(parents=True)
    (tmp_path / name / "__init__.py").write_text("")
  (tmp_path / "jax_plugins" / "xla_cuda12" / "__init__.py").write_text(
    "import os\n"
    "def initialize():\n"
    "  if os.environ.get('JAX_PLATFORMS') != 'cpu':\n"
    "    raise RuntimeError('Unable to load CUDA. Is it installed?')\n"
    "  os.write(2, b'Could not find cuda drivers on your machine\\n' * 4)\n"
  )
  return tmp_path


USE = "; import jax; print(jax.devices()[0].platform)"


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="this machine has an NVIDIA driver")
def test_cuda_wheels_without_a_driver_print_one_line_and_use_the_cpu(wheels):
  plain = run("pass" + USE, wheels)
  assert "Traceback" in plain.stderr  # What the set-up spares the user.
  ours = run("from gemjax.parallel.process import set_up_process as s; s()" + USE, wheels)
  assert ours.stdout == "cpu\n"
  assert ours.stderr == "no NVIDIA driver on this machine: computing on the CPU\n"


def test_without_the_wheels_nothing_is_said():
  """Whether they are installed here or not."""
  hidden = "import importlib.util as u; found = u.find_spec; "
  hidden += "u.find_spec = lambda name, *a: None if 'plugin' in name else found(name, *a); "
  ours = run(hidden + "from gemjax.parallel.process import set_up_process as s; s()")
  assert (ours.returncode, ours.stdout, ours.stderr) == (0, "", "")


def test_a_platform_named_by_the_user_is_not_overruled(wheels):
  found = run(
    "from gemjax.parallel.process import set_up_process as s; s()" + USE,
    wheels,
    JAX_PLATFORMS="cpu",
  )
  assert found.stdout == "cpu\n" and "computing on the CPU" not in found.stderr


def test_what_the_system_refuses_is_named_with_its_file():
  code = """
import cli
print(cli._sentence(PermissionError(13, "Permission denied", "/data/manifest.json")))
early = "Configuration is not available because of an earlier failure to load: "
print(cli._told(OSError(early + "[Errno 13] Permission denied: '/x/c.py'"), []))
"""
  found = run(code, JAX_PLATFORMS="cpu").stdout.splitlines()
  assert found == [
    "/data/manifest.json cannot be used (Permission denied); mend that or name another",
    "/x/c.py cannot be read (Permission denied); make it readable or name another",
  ]


def test_a_sigterm_that_meets_a_destructor_is_not_lost():
  """Python drops what is raised in there."""
  code = """
import signal, time
import cli
from gemjax.train.termination import Termination

class Last:
  def __del__(self):
    signal.raise_signal(signal.SIGTERM)

def main():
  with Termination("stopped"):
    last = Last()
    del last
    print("it was dropped", flush=True)
    time.sleep(60)

cli.run(main, accelerated=False)
"""
  done = run(code)
  assert (done.returncode, done.stdout) == (143, "it was dropped\n"), done.stderr
  assert done.stderr == "error: stopped; the same command begins anew\n"
