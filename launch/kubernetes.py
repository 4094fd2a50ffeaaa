"""Writes a JobSet manifest for Kubernetes.

  python launch/kubernetes.py --nodes=16 --gpus=8 --config=configs/wukong_paper.py \
    --image=registry/gemjax:1 --claim=runs:/runs --workdir=/runs/paper --output=paper.yaml \
    -- --config.mesh.model=64

What stands behind -- goes to launch/train.py.
"""

import sys

import cli
from absl import flags
from jobs import job, jobset

_NAMESPACE = flags.DEFINE_string("namespace", "", "Of the cluster.")
_CLAIMS = flags.DEFINE_multi_string("claim", [], "CLAIM:/PATH, a persistent volume claim.")
_LOCAL = flags.DEFINE_string(
  "local", "", "Folder of every host's own, there also in its pods; for --config.checkpoint.local."
)


def main(overrides: list[str]):
  described = job.from_flags(overrides)
  volumes = {"claims": _CLAIMS.value, "local": _LOCAL.value}
  text = jobset.manifest(described, namespace=_NAMESPACE.value, **volumes)
  if lost := jobset.lost_snapshots(described, **volumes):
    print(lost, file=sys.stderr)
  job.write(text, "kubectl apply -f")


if __name__ == "__main__":
  cli.run(main, accelerated=False, takes_command=True)
