"""Starts several processes of one run on this host, which divide its GPUs among them.

  python launch/local.py --processes=2 -- python launch/train.py --config=... --workdir=...

Where a scheduler starts this once a host, the processes of all hosts are one run.
"""

import os
import sys

import cli
from absl import flags
from jobs import local, presets

from gemjax.parallel.place import resolve

_PROCESSES = flags.DEFINE_integer("processes", None, "How many.", lower_bound=1, required=True)
_XLA = flags.DEFINE_enum("xla", "default", list(presets.PRESETS), "Settings; jobs/presets.py.")


def main(command: list[str]) -> int:
  if not command:
    raise local.LocalError("a command is missing; write it behind --, as -- python launch/train.py")
  environ = os.environ | presets.local_environment(_XLA.value)
  place, gpus = resolve(environ), local.gpus(environ)
  environs = local.environments(_PROCESSES.value, place, gpus, environ)
  sys.exit(local.run(command, environs))


if __name__ == "__main__":
  cli.run(main, accelerated=False, takes_command=True)
