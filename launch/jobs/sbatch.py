"""A job as a script of Slurm's sbatch."""

from __future__ import annotations

import re
import shlex

from jobs.job import Job, JobError

GRACE_SECONDS = 300  # Between SIGTERM, upon which a run saves, and the end of the time limit.


def script(job: Job, *, directives: list[str], mounts: list[str], time: str) -> str:
  """The script, complete.

  Args:
    job: What runs.
    directives: Further `#SBATCH` lines, as `--partition=gpu`.
    mounts: HOST:CONTAINER folders of a container (pyxis).
    time: The limit, as `24:00:00`.

  Raises:
    JobError: a directive is no option, the time none of Slurm's, a mount no pair, the code's folder
      cannot be written into a line, or there are mounts but no image.
  """
  for directive in directives:
    if not directive.startswith("-") or "\n" in directive:
      raise JobError(f"--directive={directive} must be an option of sbatch, as --account=ads")
  if not re.fullmatch(r"(\d+-)?\d+(:[0-5]\d){0,2}", time):
    raise JobError(
      f"--time={time} must be minutes, hours:minutes:seconds, or days-hours, with at most 59 "
      "behind a colon"
    )
  for mount in mounts:
    # Source: pyxis' --container-mounts=SRC:DST[:FLAGS], of which a comma would begin another.
    if not re.fullmatch(r"[^:,]+:[/.][^:,]*(:[^:,]+)?", mount):
      raise JobError(f"--mount={mount} must be HOST:/CONTAINER, as /data:/data or /data:/data:ro")
  if not job.code.isprintable():
    raise JobError(f"--code={job.code!r} must be a folder's name in one line")
  if mounts and not job.image:
    raise JobError(f"--mount={mounts[0]} needs --image: without a container nothing is mounted")
  lines = [
    f"--job-name={job.name}",
    f"--nodes={job.nodes}",
    f"--ntasks-per-node={job.processes}",
    # All GPUs of the node for all of its tasks; each process takes its own by SLURM_LOCALID. Bound
    # to tasks (--gpus-per-task) NCCL could not reach its neighbours through peer access.
    *([f"--gpus-per-node={job.gpus}"] if job.gpus else []),
    f"--time={time}",
    f"--signal=TERM@{GRACE_SECONDS}",  # To the tasks: they save and end with 143.
    "--requeue",  # A lost node: the same command goes on from the last checkpoint.
    "--open-mode=append",
    "--output=%x-%j.log",
    *([f"--chdir={_quoted(job.code)}"] if job.code and not job.image else []),
    *directives,
  ]
  container = [
    *([f"--container-image={job.image}"] if job.image else []),
    *([f"--container-mounts={','.join(mounts)}"] if mounts else []),
    *([f"--container-workdir={job.code}"] if job.image and job.code else []),
  ]
  # Its own message is in the log before srun ends the others.
  step = ["srun", "--label", "--kill-on-bad-exit=1", "--distribution=block", *container]
  # XLA's flags follow those of the submitter or of the node, as with launch/local.py.
  before = {"XLA_FLAGS": '"${XLA_FLAGS:+$XLA_FLAGS }"'}
  exports = [
    f"export {name}={before.get(name, '')}{shlex.quote(value)}"
    for name, value in job.environment.items()
  ]
  return "\n".join(
    [
      "#!/bin/bash",
      *(f"#SBATCH {line}" for line in lines),
      "",
      "set -euo pipefail",
      *exports,
      f"{shlex.join(step)} \\",
      f"  {shlex.join(job.command)}",
      "",
    ]
  )


def _quoted(text: str) -> str:
  """For a line of `#SBATCH`, where any quotes group, and a backslash escapes in all of them.

  Source: _get_argument of Slurm's src/sbatch/opt.c.
  """
  return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
