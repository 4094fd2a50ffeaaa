"""Real compilations for H100s that are not here, in one process of their own (programs.py)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gemjax.plan import target

pytestmark = pytest.mark.skipif(
  not target.has_cuda_wheels(),
  reason="the CUDA wheels, with which JAX compiles for GPUs, are absent",
)
TABLE = 10_007 * 64 * 4


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
  dump = tmp_path_factory.mktemp("dump")
  done = subprocess.run(
    [sys.executable, Path(__file__).with_name("programs.py"), dump],
    env=target.environment(dump),
    capture_output=True,
    text=True,
  )
  assert not done.returncode, done.stderr[-4000:]
  return json.loads(done.stdout)


def by_kind(report):
  return {(c["kind"], *c["axes"]): c for c in report["collectives"]}


@pytest.mark.parametrize("name, data, model", [("communication", 2, 4), ("wide", 2, 64)])
def test_collectives_are_the_ones_meant_with_the_bytes_of_the_formula(reports, name, data, model):
  found = by_kind(reports[name])
  w, x = 1024 * 1024 * 4, 4096 * 1024 * 4
  n = data * model
  assert {k: (c["bytes"], c["trips"], len(c["groups"])) for k, c in found.items()} == {
    ("all-to-all", "model"): (x - x // model, 1, data),
    ("all-gather", "model"): (w - w // model, 1, data),
    ("reduce-scatter", "model"): (w - w // model, 5, data),
    ("all-reduce", "data"): (2 * (w // model) * (data - 1) // data, 5, model),
    ("collective-permute", "model"): (x, 1, n),
    ("all-reduce", "data", "model"): (2 * 4 * (n - 1) // n, 1, 1),
  }
  assert not any(c["dynamic"] for c in found.values())


def test_an_exchange_along_the_wrong_axis_and_a_loop_without_count_are_seen(reports):
  found = by_kind(reports["swapped"])
  assert found["all-to-all", "data"]["bytes"] == 512 * 8 * 4 // 2
  assert ("all-to-all", "model") not in found
  assert found["all-gather", "model"]["dynamic"]
  assert not found["all-to-all", "data"]["dynamic"]


def test_the_schedule_follows_the_costs_that_it_is_given(reports):
  behind = reports["scheduled"]
  assert behind["1e-09"] <= 1 and behind["1.0"] == 4


def test_an_exchange_beside_matrix_products_is_hidden_behind_them(reports):
  (exchange,) = reports["hidden"]["collectives"]
  assert exchange["async_"] and exchange["overlapped_ops"].get("__cublas$lt$matmul", 0) >= 1
  (needed,) = [c for c in reports["gathered"]["collectives"] if c["kind"] == "all-gather"]
  assert not needed["overlapped_ops"]


@pytest.mark.parametrize("name", ["unique", "loop", "add"])
def test_a_donated_table_that_is_scattered_into_is_aliased_and_not_copied(reports, name):
  report = reports[name]
  assert report["memory"]["aliased"] == report["memory"]["outputs"] == TABLE
  assert report["memory"]["temporaries"] < TABLE / 10
  assert report["written"] == report["allocated"] == []
  assert ["parameter", TABLE, True] in report["allocations"]


@pytest.mark.parametrize(
  "name, writes",
  [
    ("dense", ["fusion", "fusion"]),  # The zeros of the gradient, and the update of every row.
    ("branch", ["copy"] * 3),  # lax.cond does not update in place.
    ("kept", ["copy"]),  # Not donated.
    ("gathered", ["all-gather-done"]),  # The global table, on every device.
  ],
)
def test_a_table_sized_temporary_is_found_by_both_witnesses(reports, name, writes):
  assert reports[name]["written"] == writes
  assert reports[name]["allocated"]
  memory = reports[name]["memory"]
  assert memory["temporaries"] + memory["outputs"] - memory["aliased"] >= TABLE


def test_compare_and_swap_is_found_and_unique_rows_need_none(reports):
  for name in ("add", "add_vector", "assign"):
    assert reports[name]["cas"] == ["input_scatter_fusion"], name
  for name in ("unique", "unique_bf16", "loop"):
    assert reports[name]["cas"] == [] and reports[name]["adds"] == 0, name
    assert reports[name]["registers"], "ptxas compiled no kernel"


def test_every_target_compiles_for_its_own_architecture(reports):
  assert {name: found["sm"] for name, found in reports["targets"].items()} == {
    "a100": "sm_80",
    "h100": "sm_90a",
    "h200": "sm_90a",
    "b200": "sm_100a",
  }
  assert all(found["cublas"] for found in reports["targets"].values())


def test_products_of_8_bits_are_those_of_cublas_where_the_gpu_has_them(reports):
  """Forward, to x and to W, of two maps."""
  flops = 3 * 2 * 2048 * (512 * 1024 + 1024 * 256)
  hopper, ampere = reports["eight_bits"]["h100"], reports["eight_bits"]["a100"]
  assert hopper["products"] == ["__cublas$lt$matmul$f8"] * 6
  assert hopper["float8_flops"] == hopper["flops"] == flops
  assert ampere["products"] == ["__cublas$lt$matmul"] * 6
  assert ampere["float8_flops"] == 0 and ampere["flops"] == flops


def test_layers_pass_over_their_arrays_no_more_often_than_they_must(reports):
  """A norm: x for each of two moments, (x, dy) -> (y, gains), (x, dy) -> dx. An MLP: two products
  and their four gradients, the ReLU's with one bias' and the other bias' alone; the ReLU itself is
  part of its product.
  """
  norm, mlp = reports["layers"]["norm"], reports["layers"]["mlp"]
  assert norm["passes"] == pytest.approx(1 + 1 + 3 + 3, rel=0.05)
  assert mlp["epilogues"].count("BIAS_RELU") == 1
  assert mlp["passes"] == pytest.approx(6 * 2 + 3 + 1, rel=0.05)


def test_gpus_of_a_host_belong_to_one_process(reports):
  assert reports["hosts"] == [[0, 0, 0, 0], [1, 1, 1, 1]]
