"""Several real processes on this host: their places, devices, output and end."""

import os
import signal
import subprocess
import sys
import time

import pytest
from paths import PATHS, ROOT

PLACE = (
  "import os; e = os.environ; print(e['JAX_PROCESS_ID'], e['JAX_NUM_PROCESSES'], "
  "e.get('CUDA_VISIBLE_DEVICES')); print(e['JAX_COORDINATOR_ADDRESS'])"
)


def python(code: str) -> list[str]:
  return ["--", sys.executable, "-c", code]


def start(*flags, **env):
  return subprocess.Popen(
    [sys.executable, str(ROOT / "launch" / "local.py"), *flags],
    env=os.environ | {"PYTHONPATH": PATHS} | env, cwd=ROOT, text=True,
    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip


def alive(pid: int) -> bool:
  try:
    with open(f"/proc/{pid}/stat") as file:
      return file.read().rsplit(")", 1)[1].split()[0] != "Z"
  except FileNotFoundError:
    return False


def test_gpus_are_divided_and_lines_labelled(launch):
  gpus = {"CUDA_VISIBLE_DEVICES": "4,5,6,7", "JAX_PLATFORMS": ""}
  code, out, err = launch("local", "--processes=2", *python(PLACE), **gpus)
  lines = sorted(out.splitlines())
  assert (code, err) == (0, "")
  assert [line for line in lines if "127" not in line] == ["[0] 0 2 4,5", "[1] 1 2 6,7"]
  assert len({line[4:] for line in lines if "127.0.0.1:" in line}) == 1  # One address for all.


def test_gpus_that_cannot_be_divided(launch):
  gpus = {"CUDA_VISIBLE_DEVICES": "0,1,2", "JAX_PLATFORMS": ""}
  code, _, err = launch("local", "--processes=2", *python("1"), **gpus)
  assert code == 1 and err.startswith("error: 3 GPUs cannot be divided among --processes=2")


@pytest.mark.parametrize("hidden", ["-1", "", "NoDevFiles"])
def test_hidden_gpus_are_none(hidden, launch):
  gpus = {"CUDA_VISIBLE_DEVICES": hidden, "JAX_PLATFORMS": ""}
  code, out, err = launch("local", "--processes=2", *python(PLACE), **gpus)
  lines = [line.rstrip() for line in out.splitlines() if "127" not in line]
  assert (code, err) == (0, "")
  assert sorted(lines) == [f"[0] 0 2 {hidden}".rstrip(), f"[1] 1 2 {hidden}".rstrip()]


def test_gpus_behind_a_hidden_one_are_hidden_too(launch):
  gpus = {"CUDA_VISIBLE_DEVICES": "4, 5,-1,6", "JAX_PLATFORMS": ""}
  code, out, _ = launch("local", "--processes=2", *python(PLACE), **gpus)
  lines = sorted(line for line in out.splitlines() if "127" not in line)
  assert (code, lines) == (0, ["[0] 0 2 4", "[1] 1 2 5"])


def test_hosts_of_a_larger_run(launch):
  outer = {
    "JAX_COORDINATOR_ADDRESS": "alpha:4000", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2",
  }  # fmt: skip
  code, out, _ = launch("local", "--processes=2", *python(PLACE), JAX_PLATFORMS="cpu", **outer)
  assert code == 0
  assert sorted(out.splitlines()) == [
    "[4] 4 6 None", "[4] alpha:4000", "[5] 5 6 None", "[5] alpha:4000",
  ]  # fmt: skip


@pytest.mark.parametrize(
  ("end", "code", "how"),
  [
    ("sys.exit('error: the disk is gone')", 1, "ended with exit code 1"),
    ("sys.exit(7)", 7, "ended with exit code 7"),
    ("os.kill(os.getpid(), 9)", 137, "was killed by SIGKILL"),
  ],
)
def test_the_first_failure_ends_all(end, code, how, launch):
  program = f"""
import os, signal, sys, time
if os.environ["JAX_PROCESS_ID"] == "1":
  {end}
def stop(*_):
  print("error: rank 1 is gone", file=sys.stderr, flush=True)
  sys.exit(3)
signal.signal(signal.SIGTERM, stop)
time.sleep(1000)
"""
  found, _, err = launch("local", "--processes=3", *python(program))
  assert found == code, err
  lines = err.splitlines()
  message = ["[1] error: the disk is gone"] if code == 1 else []
  # Its own message is first, then which it was; what the others say follows.
  said = f"error: rank 1 {how} before all others, which are stopped"
  assert [line for line in lines if line in (*message, said)] == [*message, said]
  assert "[0] error: rank 1 is gone" in lines[len(message) + 1 :] or "[0]" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_handed_on_and_awaited(number):
  program = """
import signal, sys, time
def stop(number, frame):
  time.sleep(1)
  print("saved", number, flush=True)
  sys.exit(128 + number)
for number in (signal.SIGTERM, signal.SIGINT):
  signal.signal(number, stop)
print("ready", flush=True)
time.sleep(1000)
"""
  process = start("--processes=2", *python(program))
  assert sorted(process.stdout.readline() for _ in range(2)) == ["[0] ready\n", "[1] ready\n"]
  process.send_signal(number)
  out, err = process.communicate(timeout=60)
  assert process.returncode == 128 + number and err == ""
  assert sorted(out.splitlines()) == [f"[{i}] saved {int(number)}" for i in range(2)]


def test_nothing_outlives_a_killed_launcher():
  process = start("--processes=2", *python("import os, time; print(os.getpid()); time.sleep(1000)"))
  pids = [int(process.stdout.readline().split()[1]) for _ in range(2)]
  process.kill()
  process.wait()
  for _ in range(200):
    if not any(map(alive, pids)):
      break
    time.sleep(0.05)
  assert not any(map(alive, pids))
  process.communicate()


def test_no_command_and_a_wrong_one(launch):
  for command, words in (([], "a command is missing"), (["--", "no-such"], "no-such cannot be")):
    code, out, err = launch("local", "--processes=2", *command)
    assert code == 1 and not out and err.startswith(f"error: {words}") and err.count("\n") == 1
