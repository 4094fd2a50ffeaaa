"""One description of a run on many hosts, as flags; slurm.py and kubernetes.py write it out."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import shlex

from absl import flags
from jobs import presets

_NAME = flags.DEFINE_string("name", "gemjax", "Name of the job.")
_NODES = flags.DEFINE_integer("nodes", 1, "Hosts.", lower_bound=1)
_GPUS = flags.DEFINE_integer("gpus", 8, "GPUs a host; 0: the CPUs.", lower_bound=0)
_PROCESSES = flags.DEFINE_enum(
  "process", "node", ["node", "gpu"], "Whether every host or every GPU has a process of its own."
)
_IMAGE = flags.DEFINE_string("image", "", "Container image with this project.")
_CODE = flags.DEFINE_string("code", "", "Folder of this project's clone there.")
_PYTHON = flags.DEFINE_string("python", "python", "The Python of the hosts or of the image.")
_CONFIG = flags.DEFINE_string("config", None, "A file of configs/, as launch/train.py takes it.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, which all hosts share.")
_XLA = flags.DEFINE_enum("xla", "default", list(presets.PRESETS), "Settings; jobs/presets.py.")
_OUTPUT = flags.DEFINE_string("output", None, "File to write.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print instead of writing a file.")


class JobError(ValueError):
  """A description that no cluster would take."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """What runs, and on how many hosts."""

  name: str = "gemjax"
  nodes: int = 1
  gpus: int = 8  # A host; 0: CPUs.
  processes: int = 1  # A host.
  image: str = ""
  code: str = ""
  python: str = "python"
  config: str
  workdir: str
  overrides: tuple[str, ...] = ()  # Further flags of launch/train.py.
  xla: str = "default"

  def validate(self) -> None:
    """Raises JobError for the first field that no cluster would take."""
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", self.name):
      raise JobError(f"--name={self.name} must be of a-z, 0-9 and -, and at most 40 long")
    for name in ("config", "workdir"):
      if not getattr(self, name):
        raise JobError(f"--{name} is missing; see launch/train.py")
    if self.processes < 1:
      raise JobError("--process=gpu needs --gpus of at least 1")
    for flag in self.overrides:
      if not flag.startswith("--"):
        raise JobError(
          f"{flag!r} behind -- must be a flag of launch/train.py, as --config.train.seed=1"
        )

  @property
  def command(self) -> list[str]:
    """The command of one process."""
    flags_of_run = (f"--config={self.config}", f"--workdir={self.workdir}", *self.overrides)
    return [self.python, "launch/train.py", *flags_of_run]

  @property
  def environment(self) -> dict[str, str]:
    """What every process needs beside its place."""
    # A CPU run must not look for GPUs, which the image's wheels would.
    cpu = {} if self.gpus else {"JAX_PLATFORMS": "cpu"}
    return {"PYTHONUNBUFFERED": "1"} | cpu | presets.environment(self.xla)


def from_flags(overrides: list[str]) -> Job:
  """The job of the flags, validated; `overrides` stand behind `--`."""
  job = Job(
    name=_NAME.value,
    nodes=_NODES.value,
    gpus=_GPUS.value,
    processes=_GPUS.value if _PROCESSES.value == "gpu" else 1,
    image=_IMAGE.value,
    code=_CODE.value,
    python=_PYTHON.value,
    config=_CONFIG.value or "",
    workdir=_WORKDIR.value or "",
    overrides=tuple(overrides),
    xla=_XLA.value,
  )
  job.validate()
  return job


def write(text: str, then: str) -> None:
  """Prints `text`, or writes it to --output and says what comes `then`.

  Raises:
    JobError: neither --output nor --dry_run is given.
    OSError: the file cannot be written.
  """
  if _DRY_RUN.value:
    print(text, end="")
    return
  if not _OUTPUT.value:
    raise JobError("--output is missing; name a file, or give --dry_run")
  file = pathlib.Path(_OUTPUT.value)
  partial = file.with_name(file.name + ".partial")
  try:
    partial.write_text(text)
    os.replace(partial, file)
  except OSError as error:
    partial.unlink(missing_ok=True)
    raise OSError(f"writing {file} failed ({error.strerror}); name another --output") from error
  print(f"wrote {file}; start it with: {then} {shlex.quote(str(file))}")
