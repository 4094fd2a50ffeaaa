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
    ((*FLAGS, "--claim=b:/runs"), "--claim=runs:/runs: two claims are mounted at /runs"),
    ((*FLAGS, "--workdir=/elsewhere/x"), "--workdir=/elsewhere/x lies in no --claim"),
    ((*FLAGS, "--namespace=Bad NS"), "--namespace=Bad NS must be of a-z"),
  ],
)
def test_what_kubernetes_would_not_take(flags, words, launch):
  code, out, err = launch("kubernetes", "--dry_run", *flags)
  assert code == 1 and not out and re.fullmatch(f"error: {words}.*\n", err)
