"""The training step, compiled for 128 and 256 H100s that are not here."""

import itertools
import json
import pathlib
import subprocess
import sys

import pytest

from gemjax.plan import target

pytestmark = pytest.mark.skipif(
  not target.has_cuda_wheels(),
  reason="the CUDA wheels, with which JAX compiles for GPUs, are absent",
)
HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]


def run(command, environment):
  done = subprocess.run(
    [sys.executable, *map(str, command)], env=environment, cwd=ROOT, capture_output=True, text=True
  )
  assert not done.returncode, done.stderr[-4000:]
  return done.stdout


@pytest.fixture(scope="module", params=["2x64", pytest.param("16x8", marks=pytest.mark.slow)])
def step(request, tmp_path_factory):
  dump = tmp_path_factory.mktemp("dump")
  found = json.loads(run([HERE / "steps.py", dump, request.param], target.environment(dump)))
  return found | {"devices": tuple(map(int, request.param.split("x")))}


def of_kind(step, kind):
  return [x for x in step["collectives"] if x["kind"] == kind]


def test_rows_and_columns_are_exchanged_inside_the_model_axis_alone(step):
  exchanges = of_kind(step, "all-to-all")
  assert {tuple(x["axes"]) for x in exchanges} == {("model",)}
  once = [x for x in exchanges if not x["dynamic"]]
  by_part = {p: [x for x in once if f"/{p}/" in x["op_name"]] for p in ("plan", "lookup", "update")}
  # Ids of the row stack; rows of the row and of the column stack; their gradients, those of the row
  # stack in two parts of 32 columns.
  assert {p: len(found) for p, found in by_part.items()} == {"plan": 1, "lookup": 2, "update": 3}
  assert not of_kind(step, "ragged-all-to-all") and not of_kind(step, "collective-permute")


def test_bytes_of_the_exchange_are_those_of_its_buffers(step):
  """Four bytes an id, four a weight there and back (shrunk by l2, thus not as stored)."""
  _, model = step["devices"]
  capacity = step["capacity"]["row64"]
  remote = (model - 1) * capacity
  found = {x["op_name"].split("/")[-2]: set() for x in of_kind(step, "all-to-all")}
  for x in of_kind(step, "all-to-all"):
    found[x["op_name"].split("/")[-2]].add(x["bytes"])
  assert found["plan"] == {4 * remote}
  assert 64 * 4 * remote in found["lookup"] and 32 * 4 * remote in found["update"]


def test_kernels_are_gathered_and_their_gradients_scattered_inside_the_model_axis(step):
  scattered = of_kind(step, "reduce-scatter")
  assert scattered and {tuple(x["axes"]) for x in scattered} == {("model",)}
  kernels = [x for x in of_kind(step, "all-gather") if "jvp" in x["op_name"]]
  assert kernels and {tuple(x["axes"]) for x in kernels} == {("model",)}
  # bfloat16: every sharded kernel is gathered once, those of a loop over layers there and back. (A
  # loop of one turn, as with few layers, is none.)
  _, model = step["devices"]
  least = (model - 1) / model * 2 * step["sharded_kernel_elements"]
  most = least + (model - 1) / model * 2 * step["scanned_kernel_elements"]
  assert least * 0.99 <= sum(x["bytes"] * x["trips"] for x in kernels) <= most * 1.01
  reduced = [x for x in of_kind(step, "all-reduce") if x["axes"] == ["data"]]
  assert sum(x["bytes"] for x in reduced) >= 4 * step["sharded_kernel_elements"] / model


def test_no_temporary_has_the_rows_of_a_table(step):
  assert step["buffers"] == [] and step["allocated"] == []
  smallest = min(rows * width for rows, width, _ in step["stacks"].values() if rows > 1000)
  assert smallest > 1e6  # The tables are large enough to be told from activations by their rows.


def test_what_is_donated_is_overwritten(step):
  part = step["budget"]
  state = sum(part[name] for name in ("tables", "table_state", "dense", "optimizer"))
  assert step["memory"]["aliased"] >= state


def test_the_budget_is_what_the_compiler_counts(step):
  counted = step["memory"]
  total = counted["arguments"] + counted["outputs"] - counted["aliased"] + counted["temporaries"]
  assert sum(step["budget"].values()) == pytest.approx(total, rel=0.01)


def test_bytes_of_tables_are_those_of_their_rows(step):
  _, model = step["devices"]
  width = 2 if step["devices"] == (2, 64) else 4
  each = {"row": model, "replicated": 1, "column": model}
  held = sum(rows * w * width // each[kind] for rows, w, kind in step["stacks"].values())
  assert step["figures"]["bytes_per_device"]["tables"] == held


def test_matrix_flops_are_those_of_the_formula(step):
  """Forward, and twice that backward, but for the gradient of the data's own floats."""
  examples, d = 262_144 // 128, 64

  def layer(units, rank=16, fmb=16, lcb=16, hidden=(1024, 1024)):
    widths = [units * rank, *hidden, fmb * d]
    linear = lcb if units == fmb + lcb else fmb + lcb  # W_L, which R's map takes in.
    mixed = 2 * d * units * rank + d * units * linear
    return mixed + sum(a * b for a, b in itertools.pairwise(widths))

  # Units: price, user, item, hour, four of page, the history.
  inputs, head = 1 * 64 + 64 * d, 32 * d * 512 + 512
  formula = 2 * examples * (3 * (inputs + layer(9) + 3 * layer(32) + head) - 64)
  figures = step["figures"]
  assert figures["model_flops"] == pytest.approx(formula, rel=1e-6)
  # XLA pads nine units to sixteen.
  assert formula <= figures["matrix_flops"] <= 1.01 * formula
  assert figures["tensor_core_flop_share"] > 0.99 and figures["fp8_flop_share"] == 0
  assert 0 < figures["estimated_mfu"] < 1 and 0 < figures["exposed_communication_share"] < 1


def test_what_costs_is_named_by_its_module(step):
  modules = step["figures"]["module_seconds"]
  assert {"wukong_layer/mlp", "wukong_layer/mlp (backward)", "wukong_layer/fm", "update"} <= set(
    modules
  )
  assert sum(modules.values()) <= step["figures"]["estimated_step_seconds"]


def test_no_loop_of_compare_and_swap(step):
  assert step["cas"] == []


def test_ids_of_the_upcoming_batch_travel_beside_other_work(step):
  ids = [x for x in of_kind(step, "all-to-all") if "/plan/" in x["op_name"] and not x["dynamic"]]
  assert ids
  if step["devices"] == (2, 64):  # On 16x8 they are 82 KB, which XLA hides behind nothing.
    assert all(x["async"] for x in ids)


@pytest.mark.parametrize(
  "topology, mesh",
  [("h100:16x8", "2x64"), ("h100:32x8", None)],
)
@pytest.mark.slow
def test_the_papers_wukong_fits(tmp_path, topology, mesh):
  file = tmp_path / "plan.json"
  flags = [f"--topology={topology}", f"--json={file}", *([f"--mesh={mesh}"] if mesh else [])]
  out = run(
    [ROOT / "launch/plan.py", "--config=configs/wukong_paper.py", *flags], target.environment()
  )
  found = json.loads(file.read_text())
  held = found["bytes_per_device"]
  assert found["fits"] and held["total"] <= 80e9, out
  assert held["tables"] * 64 >= 627e9 * 2  # All of the paper's parameters, in bfloat16.
  assert all(f"{part} " in out for part in held)
  ids = [c for c in found["collectives"] if c["kind"] == "all-to-all" and "/plan/" in c["name"]]
  assert ids
  if (
    mesh
  ):  # Exchanged beside this batch's dense work; on the mesh of the rule XLA schedules otherwise.
    assert sum(c["behind_matmuls"] for c in ids) > 0
