"""What the compiled step needs beside the tables: nothing of a table's rows.

Of float32 and float8 tables: XLA for CPUs has no bfloat16 gather, and converts the whole of such a
table.
"""

import json
import pathlib
import subprocess
import sys

import pytest
from meshes import make_mesh
from table_step import lowered

from gemjax.embedding.row_optimizers import ROW_OPTIMIZERS
from gemjax.plan import target

ROWS = 1_000_000


@pytest.mark.parametrize("shrinking", [{"weight_decay": 0.1}, {"l2": 0.1}], ids=str)
@pytest.mark.parametrize("optimizer", sorted(ROW_OPTIMIZERS))
def test_one_device(optimizer, shrinking):
  held, step = lowered(make_mesh(1, 1), ROWS, "cpu", optimizer=optimizer, **shrinking)
  memory = step.compile().memory_analysis()
  assert memory.alias_size_in_bytes >= held  # Overwritten in place.
  assert memory.temp_size_in_bytes < 100_000 < ROWS  # Not even a byte a row.


@pytest.mark.parametrize(
  ("data", "model", "changes"),
  [
    (2, 4, {"optimizer": "rowwise_adagrad"}),
    (2, 2, {"optimizer": "sgd", "weight_decay": 0.1, "dtype": "float8_e4m3fn"}),
    (2, 2, {"optimizer": "lazy_adam", "l2": 0.1}),
    (2, 2, {"optimizer": "adagrad", "weight_decay": 0.1, "replicas": "average"}),
  ],
)
def test_several_devices(data, model, changes):
  held, step = lowered(make_mesh(data, model), ROWS, "cpu", **changes)
  memory = step.compile().memory_analysis()
  assert memory.alias_size_in_bytes >= held
  assert memory.temp_size_in_bytes < 100_000 < ROWS // model


@pytest.mark.skipif(not target.has_cuda_wheels(), reason="compiling for GPUs needs jax[cuda12]")
def test_several_gpus():
  """Tables of twice the rows need no byte more; the optimiser that reads most of its state."""
  here = pathlib.Path(__file__).parent
  done = subprocess.run(
    [sys.executable, here / "table_step.py"], capture_output=True, text=True, check=False,
    env=target.environment() | {"PYTHONPATH": str(here.parents[1])},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  small, large = json.loads(done.stdout)
  assert abs(large - small) < 100_000
