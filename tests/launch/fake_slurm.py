"""Slurm on one host: `sbatch SCRIPT` and, from inside of the script, `srun COMMAND`.

Nodes are the addresses 127.0.0.1, 127.0.0.2, ... of loopback. Options are read as strictly as by
Slurm, tasks are real processes, and their variables are those of srun(1) for such a step.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import threading

JOB_ID = 4711


def options_of(line: str) -> list[str]:
  """As _get_argument of src/sbatch/opt.c: quotes group, a backslash escapes anything but a space
  outside of quotes, # ends the line, and no shell is asked.
  """
  found, word, quote, escaped = [], "", "", False
  for char in line + " ":
    if char.isspace() and not quote:
      found, word, escaped = [*found, word] if word else found, "", False
    elif escaped:
      word, escaped = word + char, False
    elif char == "\\":
      escaped = True
    elif char == quote or (not quote and char in "\"'"):
      quote = "" if quote else char
    elif char == "#" and not quote:
      return [*found, word] if word else found
    else:
      word += char
  assert not quote, f"unmatched {quote} in {line}"
  return found


def sbatch(script: str) -> int:
  text = pathlib.Path(script).read_text()
  lines = re.findall(r"^#SBATCH(.*)$", text, re.M)
  given = [option for line in lines for option in options_of(line)]
  parser = argparse.ArgumentParser(allow_abbrev=False)
  for name in ("job-name", "output", "open-mode", "signal", "time", "partition", "chdir"):
    parser.add_argument(f"--{name}")
  for name in ("nodes", "ntasks-per-node", "gpus-per-node"):
    parser.add_argument(f"--{name}", type=int, default=0)
  parser.add_argument("--requeue", action="store_true")
  options = parser.parse_args(given)
  assert re.fullmatch(r"(\d+-)?\d+:\d\d:\d\d", options.time), options.time
  # The batch script is on the first node, as task 0 of no step.
  job = {
    "SLURM_JOB_ID": JOB_ID,
    "SLURM_JOB_NUM_NODES": options.nodes,
    "SLURM_NTASKS_PER_NODE": options.ntasks_per_node,
    "SLURM_GPUS_ON_NODE": options.gpus_per_node,
    "SLURM_PROCID": 0,
    "SLURM_LOCALID": 0,
    "SLURM_NODEID": 0,
    "SLURM_NTASKS": options.nodes * options.ntasks_per_node,
  }
  folder = pathlib.Path(script).parent / "bin"
  folder.mkdir(exist_ok=True)
  step = folder / "srun"
  step.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" srun "$@"\n')
  step.chmod(0o755)
  environ = os.environ | {k: str(v) for k, v in job.items()}
  environ["PATH"] = f"{folder}{os.pathsep}{environ['PATH']}"
  return subprocess.run(["bash", script], env=environ, cwd=options.chdir).returncode


def srun(arguments: list[str]) -> int:
  parser = argparse.ArgumentParser(allow_abbrev=False)
  for name in ("container-image", "container-mounts", "container-workdir", "distribution"):
    parser.add_argument(f"--{name}")
  parser.add_argument("--kill-on-bad-exit", type=int, default=0)
  parser.add_argument("--label", action="store_true")
  parser.add_argument("command", nargs=argparse.REMAINDER)
  options = parser.parse_args(arguments)
  nodes, tasks, gpus = (
    int(os.environ[f"SLURM_{name}"])
    for name in ("JOB_NUM_NODES", "NTASKS_PER_NODE", "GPUS_ON_NODE")
  )
  step = {
    "SLURM_STEP_ID": 0,
    "SLURM_STEP_NUM_TASKS": nodes * tasks,
    "SLURM_STEP_NUM_NODES": nodes,
    "SLURM_STEP_NODELIST": f"127.0.0.[1-{nodes}]" if nodes > 1 else "127.0.0.1",
    "SLURM_STEP_TASKS_PER_NODE": f"{tasks}(x{nodes})" if nodes > 1 else tasks,
    "SLURM_DISTRIBUTION": options.distribution,
  }
  if gpus:
    step["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(gpus)))
  started, code, lock = [], [], threading.Lock()
  for rank in range(nodes * tasks):
    own = {
      "SLURM_PROCID": rank,
      "SLURM_LOCALID": rank % tasks,
      "SLURM_NODEID": rank // tasks,
      "SLURMD_NODENAME": f"127.0.0.{rank // tasks + 1}",
    }
    environ = os.environ | {k: str(v) for k, v in (step | own).items()}
    started.append(
      subprocess.Popen(
        options.command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
      )
    )

  def follow(rank: int) -> None:
    for line in started[rank].stdout:
      print(f"{rank}: {line}" if options.label else line, end="", flush=True)
    status = started[rank].wait()
    with lock:
      if status and not code:
        code.append(status if status > 0 else 128 - status)
        if options.kill_on_bad_exit:
          for process in started:
            process.kill()

  followers = [threading.Thread(target=follow, args=(rank,)) for rank in range(len(started))]
  for thread in followers:
    thread.start()
  for thread in followers:
    thread.join()
  return code[0] if code else 0


if __name__ == "__main__":
  sys.exit(srun(sys.argv[2:]) if sys.argv[1] == "srun" else sbatch(sys.argv[1]))
