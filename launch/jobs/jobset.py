"""A job as a JobSet of Kubernetes (jobset.x-k8s.io/v1alpha2): one pod a host.

Source: https://jobset.sigs.k8s.io/docs/concepts; a pod's name in the network is
<jobset>-<replicated job>-<job>-<pod>.<jobset>.
"""

from __future__ import annotations

import pathlib
import posixpath
import re
from typing import Any, NamedTuple

import yaml
from jobs.job import Job, JobError

from gemjax.parallel.place import ADDRESS, COUNT

WORKERS, PORT = "workers", 61_440
GRACE_SECONDS = 300  # Between SIGTERM, upon which a run saves, and the kill.
RESTARTS = 10
SHARED_MEMORY = "/dev/shm"
# Names of Kubernetes (RFC 1123).
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_SUBDOMAIN = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")


def manifest(job: Job, *, namespace: str, claims: list[str], local: str) -> str:
  """The manifest, complete.

  Args:
    job: What runs.
    namespace: Of the cluster; empty: the client's.
    claims: CLAIM:PATH, persistent volume claims and where they are mounted.
    local: A folder of every host's own, mounted at the same path; empty: none.

  Raises:
    JobError: there is no image, a name is none of Kubernetes, a claim is no pair, a path is none or
      would hide others, or the workdir lies in no claim.
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
              "template": {"spec": _pod(job, claims, local)},
            }
          },
        }
      ],
    },
  }
  return yaml.safe_dump(tree, sort_keys=False, width=1_000)


def lost_snapshots(job: Job, *, claims: list[str], local: str) -> str:
  """A sentence if the job's flags put local snapshots where they end with the pod; or nothing."""
  flag = "--config.checkpoint.local="
  folders = [f.removeprefix(flag) for f in job.overrides if f.startswith(flag)]
  if not folders or not folders[-1]:
    return ""
  mount = _holding(posixpath.join(job.code or "/", folders[-1]), _mounts(job, claims, local))
  if mount and "emptyDir" not in mount.source:
    return ""
  return (
    f"{flag}{folders[-1]}: such snapshots go with the pod, and every restart makes new pods; give "
    "--local=/PATH, a folder of every host's own, and snapshots below it"
  )


class _Mount(NamedTuple):
  """A volume of every pod."""

  name: str
  path: str
  source: dict[str, Any]


def _mounts(job: Job, claims: list[str], local: str) -> list[_Mount]:
  """All volumes, checked."""
  # NCCL between processes of a host; the default of 64 MB is too little.
  found = [_Mount("shared-memory", SHARED_MEMORY, {"emptyDir": {"medium": "Memory"}})]
  for i, claim in enumerate(claims):
    name, _, path = claim.partition(":")
    if not _SUBDOMAIN.fullmatch(name) or not path.startswith("/"):
      raise JobError(f"--claim={claim} must be CLAIM:/PATH, CLAIM of a-z, 0-9, - and .")
    path = _folder(f"--claim={claim}", path)
    if any(mount.path == path for mount in found):
      raise JobError(f"--claim={claim}: two claims are mounted at {path}; give each its own path")
    found.append(_Mount(f"claim-{i}", path, {"persistentVolumeClaim": {"claimName": name}}))
  if local:
    path = _folder(f"--local={local}", local)
    if any(mount.path == path for mount in found):
      raise JobError(f"--local={local}: a claim is mounted there; give each its own path")
    source = {"hostPath": {"path": path, "type": "DirectoryOrCreate"}}
    found.append(_Mount("local", path, source))
  mount = _holding(job.workdir, found)
  if not mount or "persistentVolumeClaim" not in mount.source:
    raise JobError(
      f"--workdir={job.workdir} lies in no --claim: its checkpoints would end with the pod; give "
      "--claim=CLAIM:/PATH with the workdir below PATH"
    )
  return found


def _folder(flag: str, path: str) -> str:
  """`path` in its shortest form, if something can be mounted there."""
  parts = [part for part in path.split("/") if part not in ("", ".")]
  if not path.startswith("/") or ":" in path or ".." in parts or not path.isprintable():
    raise JobError(f"{flag}: {path!r} must be an absolute path without : and ..")
  folder = "/" + "/".join(parts)
  if pathlib.PurePosixPath(SHARED_MEMORY).is_relative_to(folder):
    raise JobError(f"{flag} would hide {SHARED_MEMORY} or all of the image; mount it elsewhere")
  return folder


def _holding(path: str, mounts: list[_Mount]) -> _Mount | None:
  """The mount in which `path` lies: the innermost."""
  path = pathlib.PurePosixPath(posixpath.normpath(path))
  around = [mount for mount in mounts if path.is_relative_to(mount.path)]
  return max(around, key=lambda mount: len(mount.path), default=None)


def _pod(job: Job, claims: list[str], local: str) -> dict[str, Any]:
  mounts = _mounts(job, claims, local)
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
    "volumeMounts": [{"name": mount.name, "mountPath": mount.path} for mount in mounts],
  }
  return {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": GRACE_SECONDS,
    "containers": [container],
    "volumes": [{"name": mount.name} | mount.source for mount in mounts],
  }
