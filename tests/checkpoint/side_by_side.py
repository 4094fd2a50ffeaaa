"""Several processes of one script of this folder: SCRIPT FOLDER ADDRESS COUNT INDEX."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def ended(script: str, folder, count: int, **environment: str) -> list[tuple[int, str, str]]:
  """Exit code, stdout and stderr of each, once all have ended."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  file = pathlib.Path(__file__).with_name(script)
  processes = [
    subprocess.Popen(
      [sys.executable, file, folder, address, str(count), str(index)],
      env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
      text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )
    for index in range(count)
  ]  # fmt: skip
  outputs = [process.communicate(timeout=200) for process in processes]
  return [(p.returncode, out, err) for p, (out, err) in zip(processes, outputs)]
