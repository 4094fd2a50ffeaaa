"""What is said of a traced run: a report and a program written by hand, and a run on this CPU."""

import json

import pytest
from test_estimate import GATHER, LAUNCH, PRODUCT, PROGRAM

from gemjax.plan import measured, rates

REPORT = {
  "step_seconds": 3e-3,
  "device": "NVIDIA H100 80GB HBM3",
  "mesh": {"data": 2, "model": 4},
  "gpus_per_host": 4,
  "kernel_flops": 0.0,
  "exposed_communication_share": 0.25,
  "idle_share": 0.125,
  "operation_seconds": {"first": 1e-3, "g": 5e-4, "new": 2e-4, "start": 4e-4, "": 1e-4},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.setitem(rates.RATES, "h100", rates.Rates(
    {"bf16": 1e15}, memory=3e12, nvlink=4e11, network=5e10, reached=0.5
  ))  # fmt: skip
  (tmp_path / "profile").mkdir()
  (tmp_path / "profile" / "step.hlo").write_text(PROGRAM)
  return tmp_path


def said(folder, **changes):
  (folder / "profile.json").write_text(json.dumps(REPORT | changes))
  return list(measured.lines(folder))


def test_modules_stand_beside_their_estimates(folder):
  rows = LAUNCH + 51_600 / 1.5e12
  step, exposed = GATHER + rows + 3 * PRODUCT + LAUNCH, GATHER - PRODUCT
  lines = said(folder)
  assert lines[:2] == [
    "measured on NVIDIA H100 80GB HBM3:",
    "  step 3.0 ms, exposed communication 25.0%, no kernel 12.5%",
  ]
  assert lines[2].startswith("estimated for the same program (roofline")
  assert lines[3] == f"  step {step * 1e3:.1f} ms, exposed communication {exposed / step:.1%}"
  # The loop's product and the first are of one module.
  assert [line.split() for line in lines[5:]] == [
    ["1.500", f"{4 * PRODUCT * 1e3:.3f}", "net/mlp"],
    ["0.400", "collectives"],
    ["0.200", f"{rows * 1e3:.3f}", "update"],
    ["0.100", "not", "in", "the", "program's", "text"],
  ]


def test_of_another_gpu_nothing_is_estimated(folder):
  lines = said(folder, device="NVIDIA L40S")
  assert lines[2] == "no estimate: the plan has no rates of it, only of a100, h100, h200, b200"
  assert lines[4].split() == ["1.500", "net/mlp"]


def test_without_a_gpu_or_a_report_one_line_says_so(folder):
  (line,) = measured.lines(folder)
  assert "ended before train.profile_steps were traced" in line
  report = {name: REPORT[name] for name in ("step_seconds", "mesh")} | {"device": "cpu"}
  (folder / "profile.json").write_text(json.dumps(report))
  assert list(measured.lines(folder)) == ["no GPU was traced (cpu): steps took 3.0 ms"]
  (folder / "profile" / "step.hlo").unlink()  # As a run of before such programs were kept left it.
  assert list(measured.lines(folder)) == [line]
