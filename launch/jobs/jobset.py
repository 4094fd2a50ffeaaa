"""A job as a JobSet of Kubernetes (jobset.x-k8s.io/v1alpha2): one pod a host.

Source: https://jobset.sigs.k8s.io/docs/concepts; a pod's name in the network is
<jobset>-<replicated job>-<job>-<pod>.<jobset>.
"""

from __future__ import annotations

import pathlib
import re
from typing import Any

import yaml
from jobs.job import Job, JobError

from gemjax.parallel.place import ADDRESS, COUNT

WORKERS, PORT = "workers", 61_440
GRACE_SECONDS = 300  # Between SIGTERM, upon which a run saves, and the kill.
RESTARTS = 10
# Names of Kubernetes (RFC 1123).
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")


def manifest(job: Job, *, namespace: str, claims: list[str]) -> str:
  """The manifest, complete.

  Args:
    job: What runs.
    namespace: Of the cluster; empty: the client's.
    claims: CLAIM:PATH, persistent volume claims and where they are mounted.

  Raises:
    JobError: there is no image, a name is none of Kubernetes, a claim is no pair, two claims share
      a path, or the workdir lies in none of them.
  """
  if not job.image:
    raise JobError("--image is missing; Kubernetes runs containers only")
  if namespace and not _LABEL.fullmatch(namespace):
    raise JobError(f"--namespace={namespace} must be of a-z, 0-9 and -, and at most 63 long")
  metadata = {"name": job.name} | ({"namespace": namespace} if namespace else {})
  tree = {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": metadata,
    "spec": {
      # Any pod that fails starts all anew: the same command goes on from the last checkpoint.
      "failurePolicy": {"maxRestarts": RESTARTS},
      # The roll call happens before any pod is ready.
      "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
      "replicatedJobs": [
        {
          "name": WORKERS,
          "replicas": 1,
          "template": {
            "spec": {
              "completionMode": "Indexed",  # JOB_COMPLETION_INDEX is the host's number.
              "parallelism": job.nodes,
              "completions": job.nodes,
              "backoffLimit": 0,
              "template": {"spec": _pod(job, claims)},
            }
          },
        }
      ],
    },
  }
  return yaml.safe_dump(tree, sort_keys=False, width=1_000)


def _mounts(job: Job, claims: list[str]) -> list[tuple[str, str]]:
  """(claim, path) pairs, checked."""
  pairs = [claim.partition(":")[::2] for claim in claims]
  for claim, (name, path) in zip(claims, pairs):
    if not _SUBDOMAIN.fullmatch(name) or not path.startswith("/"):
      raise JobError(f"--claim={claim} must be CLAIM:/PATH, CLAIM of a-z, 0-9, - and .")
    if sum(other == path for _, other in pairs) > 1:
      raise JobError(f"--claim={claim}: two claims are mounted at {path}; give each its own path")
  workdir = pathlib.PurePosixPath(job.workdir)
  if not any(workdir.is_relative_to(path) for _, path in pairs):
    raise JobError(
      f"--workdir={job.workdir} lies in no --claim: its checkpoints would end with the pod; give "
      "--claim=CLAIM:/PATH with the workdir below PATH"
    )
  return pairs


def _pod(job: Job, claims: list[str]) -> dict[str, Any]:
  pairs = _mounts(job, claims)
  several = job.nodes > 1
  place = {
    ADDRESS: f"{job.name}-{WORKERS}-0-0.{job.name}:{PORT}",
    COUNT: str(job.nodes),  # launch/local.py multiplies it by its processes.
  }
  environment = (place if several else {}) | job.environment
  command = job.command
  if job.processes > 1:
    command = [job.python, "launch/local.py", f"--processes={job.processes}", "--", *command]
  container = {
    "name": "train",
    "image": job.image,
    **({"workingDir": job.code} if job.code else {}),
    "command": command,
    "env": [{"name": name, "value": value} for name, value in environment.items()],
    "ports": [{"containerPort": PORT}],
    **({"resources": {"limits": {"nvidia.com/gpu": job.gpus}}} if job.gpus else {}),
    "volumeMounts": [
      {"name": "shared-memory", "mountPath": "/dev/shm"},
      *({"name": f"claim-{i}", "mountPath": path} for i, (_, path) in enumerate(pairs)),
    ],
  }
  return {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": GRACE_SECONDS,
    "containers": [container],
    "volumes": [
      # NCCL between processes of a host; the default of 64 MB is too little.
      {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
      *(
        {"name": f"claim-{i}", "persistentVolumeClaim": {"claimName": name}}
        for i, (name, _) in enumerate(pairs)
      ),
    ],
  }
