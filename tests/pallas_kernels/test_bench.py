"""The bench of the ops: its keys, what it says without a GPU and with one, what it refuses."""

import json
import subprocess
import sys
import types

import numpy as np
import pytest

from pallas_kernels import bench, cli

KEYS = {
  *("op", "shape", "flops_needed", "bytes_needed", "flops_visited", "tiles_visited"),
  *("useful_tile_share", "xla_ms", "padded_ms", "xla_over_padded_speed"),
}


@pytest.mark.parametrize(
  "ops", [("jagged_pool", "quantize_fp8"), pytest.param(cli.OPS, marks=pytest.mark.slow)]
)
def test_every_op_has_rows_with_the_same_keys(ops, tmp_path, capsys):
  file = tmp_path / "bench.json"
  assert bench.main(["--quick", f"--op={','.join(ops)}", f"--json={file}"]) == 0
  rows = json.loads(file.read_text())
  assert {row["op"] for row in rows} == {*ops}
  assert len({(row["op"], row["shape"]) for row in rows}) == len(rows)
  for row in rows:
    assert row.keys() - {"baseline"} >= KEYS, row
    assert row["bytes_needed"] > 0 and row["flops_needed"] >= 0
    share = row["useful_tile_share"]
    assert share is None or 0 < share <= 1
    assert row["xla_ms"] > 0 and row["padded_ms"] > 0
    assert row["xla_over_padded_speed"] == pytest.approx(row["padded_ms"] / row["xla_ms"])
  out = capsys.readouterr().out
  assert out.count("were not measured: this machine has no GPU.") == 1


def made_up(quick):
  yield {
    "op": "made_up",
    "shape": "quick" if quick else "full",
    "flops_needed": np.int64(3),
    "bytes_needed": 4,
    "flops_visited": 3.0,
    "tiles_visited": None,
    "useful_tile_share": None,
    "xla_ms": np.float32(2),
    "padded_ms": 4.0,
    "xla_over_padded_speed": 2.0,
  }


@pytest.fixture
def one_op(monkeypatch):
  op = types.SimpleNamespace(rows=made_up)
  monkeypatch.setattr(cli, "modules", lambda part, ops: [op])
  return op


def test_with_a_gpu_its_figures_join_the_rows(one_op, monkeypatch, tmp_path, capsys):
  one_op.gpu_rows = lambda: [{"op": "made_up", "shape": "full", "tflops": 5.0}]
  monkeypatch.setattr(bench, "_has_gpu", lambda: True)
  file = tmp_path / "bench.json"
  assert bench.main([f"--json={file}"]) == 0
  (row,) = json.loads(file.read_text())
  assert row.keys() == KEYS | {"tflops"}
  assert (row["flops_needed"], row["xla_ms"], row["tflops"]) == (3, 2.0, 5.0)
  out = capsys.readouterr().out
  assert "tflops 5.0" in out and "no GPU" not in out


def test_without_a_gpu_nothing_of_it_is_run(one_op, monkeypatch, capsys):
  one_op.gpu_rows = lambda: pytest.fail("there is no GPU")
  monkeypatch.setattr(bench, "_has_gpu", lambda: False)
  assert bench.main(["--quick"]) == 0
  assert "quick" in capsys.readouterr().out


@pytest.mark.parametrize(
  "flag, says",
  [
    ("--op=pool", "'pool' is not one of jagged_attention, "),
    ("--json=nowhere/x.json", "the folder nowhere does not exist; create it first"),
  ],
)
def test_bad_flags_are_refused_before_anything_is_measured(flag, says, tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "pallas_kernels.bench", flag],
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1 and not done.stdout
  assert says in done.stderr and done.stderr.count("\n") == 1
