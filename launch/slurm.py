"""Writes a script for Slurm's sbatch.

  python launch/slurm.py --nodes=16 --gpus=8 --config=configs/wukong_paper.py \
    --workdir=/shared/runs/paper --directive=--partition=h100 --output=paper.sbatch \
    -- --config.mesh.model=64

What stands behind -- goes to launch/train.py.
"""

import cli
from absl import flags
from jobs import job, sbatch

_DIRECTIVES = flags.DEFINE_multi_string("directive", [], "Further #SBATCH line, --account=ads.")
_MOUNTS = flags.DEFINE_multi_string("mount", [], "HOST:CONTAINER folder of the container.")
_TIME = flags.DEFINE_string("time", "24:00:00", "Limit.")


def main(overrides: list[str]):
  text = sbatch.script(
    job.from_flags(overrides),
    directives=_DIRECTIVES.value,
    mounts=_MOUNTS.value,
    time=_TIME.value,
  )
  job.write(text, "sbatch")


if __name__ == "__main__":
  cli.run(main, accelerated=False, takes_command=True)
