"""The manifest against JobSet's own schema, and its pods as processes of this host."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import yaml
from paths import PATHS, ROOT

SCHEMA = json.loads((pathlib.Path(__file__).parent / "jobset_schema.json").read_text())["schema"]
FLAGS = ("--config=c.py", "--workdir=/runs/x", "--image=registry/gemjax:1", "--claim=runs:/runs")
TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}


def check(value, schema, path="manifest"):
  """As the API server with strict field validation: raises AssertionError with the field."""
  if schema.get("x-kubernetes-int-or-string"):
    assert isinstance(value, int | str), path
    return
  assert type(value) is TYPES[schema["type"]], f"{path} must be of type {schema['type']}"
  if "enum" in schema:
    assert value in schema["enum"], f"{path}: {value!r}"
  if "minimum" in schema:
    assert value >= schema["minimum"], path
  if schema["type"] == "array":
    assert len(value) <= schema.get("maxItems", len(value)), path
    if keys := schema.get("x-kubernetes-list-map-keys"):
      found = [[item.get(key) for key in keys] for item in value]
      assert all(found.count(key) == 1 for key in found), f"{path}: {keys} must be unique"
    for i, item in enumerate(value):
      check(item, schema["items"], f"{path}[{i}]")
  if schema["type"] == "object" and ("properties" in schema or "additionalProperties" in schema):
    for name in schema.get("required", ()):
      assert name in value, f"{path}.{name} is missing"
    for name, field in value.items():
      known = schema.get("properties", {}).get(name) or schema.get("additionalProperties")
      assert known, f"{path}.{name} does not exist"
      check(field, known, f"{path}.{name}")


def manifest(launch, *flags):
  code, out, err = launch("kubernetes", "--dry_run", *flags)
  assert code == 0, err
  return yaml.safe_load(out)


def pod(tree):
  return tree["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


def volume_at(tree, path):
  [mount] = [m for m in pod(tree)["containers"][0]["volumeMounts"] if m["mountPath"] == path]
  [volume] = [v for v in pod(tree)["volumes"] if v["name"] == mount["name"]]
  return {kind: source for kind, source in volume.items() if kind != "name"}


@pytest.mark.parametrize("nodes", [1, 16])
@pytest.mark.parametrize("process", ["node", "gpu"])
@pytest.mark.parametrize("gpus", [1, 8])
def test_the_schema_of_jobset_holds(nodes, process, gpus, launch):
  shape = (f"--nodes={nodes}", f"--process={process}", f"--gpus={gpus}", "--xla=zero_cta")
  tree = manifest(launch, *FLAGS, *shape, "--namespace=ads", "--code=/gemjax")
  check(tree, SCHEMA)
  job = tree["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert job["parallelism"] == job["completions"] == nodes
  [container] = pod(tree)["containers"]
  assert container["resources"]["limits"] == {"nvidia.com/gpu": gpus}
  mounted = {m["name"] for m in container["volumeMounts"]}
  assert mounted == {v["name"] for v in pod(tree)["volumes"]}


@pytest.mark.parametrize(
  ("field", "value"),
  [("command", "python"), ("comand", ["python"]), ("env", [{"value": "x"}]), ("image", 1)],
)
def test_the_check_finds_faults(field, value, launch):
  tree = manifest(launch, *FLAGS)
  pod(tree)["containers"][0][field] = value
  with pytest.raises(AssertionError, match=rf"containers\[0\]\.{field}"):
    check(tree, SCHEMA)


def test_the_check_finds_two_volumes_at_one_path(launch):
  tree = manifest(launch, *FLAGS)
  pod(tree)["containers"][0]["volumeMounts"].append({"name": "x", "mountPath": "/runs"})
  with pytest.raises(AssertionError, match=r"volumeMounts: \['mountPath'\] must be unique"):
    check(tree, SCHEMA)


# The second is the hosts' memory, inside of the pod's own.
@pytest.mark.parametrize("folder", ["/mnt/disk", "/dev/shm/gemjax"])
def test_a_folder_of_the_hosts_keeps_snapshots(folder, launch):
  code, out, err = launch(
    "kubernetes", "--dry_run", *FLAGS, f"--local={folder}/", "--claim=data:/mnt", "--",
    f"--config.checkpoint.local={folder}/snapshots", "--config.checkpoint.local_every=100",
  )  # fmt: skip
  assert (code, err) == (0, "")
  tree = yaml.safe_load(out)
  check(tree, SCHEMA)
  assert volume_at(tree, folder) == {"hostPath": {"path": folder, "type": "DirectoryOrCreate"}}
  assert volume_at(tree, "/mnt") == {"persistentVolumeClaim": {"claimName": "data"}}
  assert volume_at(tree, "/dev/shm") == {"emptyDir": {"medium": "Memory"}}


@pytest.mark.parametrize(
  ("local", "folder", "lost"),
  [
    ("", "/dev/shm/gemjax", True),
    ("", "/scratch", True),
    ("/mnt/disk", "/mnt/disks", True),
    ("/mnt/disk", "/mnt/disk/../x", True),
    ("/mnt/disk", "snapshots", True),  # In the image, where the command starts.
    ("/mnt/disk", "/mnt/disk", False),
    ("", "/runs/snapshots", False),  # A claim outlives pods.
    ("", "", False),
  ],
)
def test_snapshots_that_would_go_with_the_pod(local, folder, lost, launch):
  snapshots = ("--config.checkpoint.local=/scratch", f"--config.checkpoint.local={folder}")
  code, out, err = launch("kubernetes", "--dry_run", *FLAGS, f"--local={local}", "--", *snapshots)
  assert code == 0 and "kind: JobSet" in out
  said = f"--config.checkpoint.local={re.escape(folder)}: such snapshots go with the pod.*\n"
  assert re.fullmatch(said if lost else "", err)


def test_the_pods_are_one_run(launch, stub):
  shape = ("--nodes=2", "--gpus=2", "--process=gpu", f"--python={stub}", "--name=ads")
  [container] = pod(manifest(launch, *FLAGS, *shape))["containers"]
  environ = {entry["name"]: entry["value"] for entry in container["env"]}
  # The first pod by JobSet's rule for names: <jobset>-<replicated job>-<job>-<pod>.<jobset>.
  assert environ["JAX_COORDINATOR_ADDRESS"].split(":")[0] == "ads-workers-0-0.ads"
  # The launcher is real, what it starts is the stub.
  command = [sys.executable, *container["command"][1:]]
  lines = []
  for index in range(2):
    given = {"JOB_COMPLETION_INDEX": str(index), "CUDA_VISIBLE_DEVICES": "GPU-a,GPU-b"}
    given["JAX_PLATFORMS"] = ""  # As in the image, not as in these tests.
    done = subprocess.run(
      command, env=os.environ | {"PYTHONPATH": PATHS} | environ | given, cwd=ROOT, text=True,
      capture_output=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines += done.stdout.splitlines()
  end = " None launch/train.py --config=c.py --workdir=/runs/x"
  assert sorted(lines) == [
    f"[{i}] {i} 4 ads-workers-0-{i // 2} {'GPU-a' if i % 2 == 0 else 'GPU-b'}{end}"
    for i in range(4)
  ]


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (("--config=c", "--workdir=w"), "--image is missing"),
    (
      ("--config=c", "--workdir=w", "--image=i", "--claim=runs"),
      "--claim=runs must be CLAIM:/PATH",
    ),
    ((*FLAGS, "--claim=Runs_X:/b"), "--claim=Runs_X:/b must be CLAIM:/PATH"),
    ((*FLAGS, "--claim=b:/runs"), "--claim=b:/runs: two claims are mounted at /runs"),
    ((*FLAGS, "--claim=b:/runs/"), "--claim=b:/runs/: two claims are mounted at /runs"),
    ((*FLAGS, "--claim=b://runs"), "--claim=b://runs: two claims are mounted at /runs"),
    ((*FLAGS, "--claim=shm:/dev/shm"), "--claim=shm:/dev/shm would hide /dev/shm"),
    ((*FLAGS, "--claim=dev:/dev/"), "--claim=dev:/dev/ would hide /dev/shm"),
    ((*FLAGS, "--claim=r:/"), "--claim=r:/ would hide /dev/shm or all of the image"),
    ((*FLAGS, "--claim=d:/data:ro"), "--claim=d:/data:ro: '/data:ro' must be an absolute path"),
    ((*FLAGS, "--claim=d:/data/../x"), "--claim=d:/data/../x: '/data/../x' must be an absolute"),
    ((*FLAGS, "--local=disk"), "--local=disk: 'disk' must be an absolute path"),
    ((*FLAGS, "--local=/dev/shm"), "--local=/dev/shm would hide /dev/shm"),
    ((*FLAGS, "--local=/runs"), "--local=/runs: a claim is mounted there"),
    ((*FLAGS, "--local=/runs/x"), "--workdir=/runs/x lies in no --claim"),
    ((*FLAGS, "--workdir=/runs/../tmp/x"), "--workdir=/runs/../tmp/x lies in no --claim"),
    ((*FLAGS, "--workdir=/dev/shm/x"), "--workdir=/dev/shm/x lies in no --claim"),
    ((*FLAGS, "--workdir=/elsewhere/x"), "--workdir=/elsewhere/x lies in no --claim"),
    ((*FLAGS, "--namespace=Bad NS"), "--namespace=Bad NS must be of a-z"),
  ],
)
def test_what_kubernetes_would_not_take(flags, words, launch):
  code, out, err = launch("kubernetes", "--dry_run", *flags)
  assert code == 1 and not out and re.fullmatch(f"error: {words}.*\n", err)
