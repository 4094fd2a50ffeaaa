"""FuxiCTR's WuKong, trained in plain PyTorch: its logits here, and its bits on the way back."""

import json

import numpy as np
import pytest
import small
from runs import config_of, convert, logits

from gemjax.train.loop import train
from gemjax.train.trained import evaluate_run

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[convert]'")
import fuxictr_wukong  # noqa: E402
from torch_training import logits_of_test, trained  # noqa: E402


def model_of(config, sizes=small.SIZES):
  model = config.model
  rank = model.rank if model.fm == "optimised" else None
  return fuxictr_wukong.WuKong(
    dict.fromkeys(small.DENSE, 0) | sizes, shared={"seen": "item"}, dim=small.DIM,
    layers=model.layers, fmb=model.fmb_units, lcb=model.lcb_units, rank=rank,
    hidden=list(model.mlp), head=list(model.head), batch_norm=model.head_norm == "batch",
    dropout=model.dropout,
  )  # fmt: skip


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
  "change",
  [
    pytest.param({}, id="batch_norm"),
    pytest.param({"head_norm": "none", "layers": 2, "dropout": 0.2}, id="dropout", marks=SLOW),
    pytest.param({"fm": "basic", "lcb_units": 4}, id="basic", marks=SLOW),
  ],
)
def test_its_logits_here_and_its_bits_on_the_way_back(data, tmp_path, change):
  """With 4 + 2 units the first layer needs no map in its residual."""
  config = config_of("fuxictr", data, **change)
  torch.manual_seed(1)
  model = trained(model_of(config))
  file, run, back = tmp_path / "WuKong.model", tmp_path / "run", tmp_path / "back.model"
  torch.save(model.state_dict(), file)
  convert("fuxictr", "gemjax", file, run, config=config, verify=True)
  want = logits_of_test(model)
  got = logits(run, "test")[:, 0]
  assert np.std(want) > 0.1
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
  convert("gemjax", "fuxictr", run, back, verify=True)
  found = torch.load(back, weights_only=True)
  assert found.keys() == model.state_dict().keys()
  for name, tensor in model.state_dict().items():
    assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
  model_of(config).load_state_dict(found)  # Strict.


def test_the_run_is_evaluated_and_trained_on(data, tmp_path):
  config = config_of("fuxictr", data)
  model = trained(model_of(config))
  torch.save(model.state_dict(), tmp_path / "WuKong.model")
  run = tmp_path / "run"
  convert("fuxictr", "gemjax", tmp_path / "WuKong.model", run, config=config)
  before = evaluate_run(run, "test")
  assert before.step == 0 and before.results["click"]["examples"] == small.EXAMPLES["test"]
  summary = train(config, run)
  assert summary["train"]["steps"] == 10
  assert json.loads((run / "run.json").read_text())["config"] == config.to_json()
  assert summary["test"]["log_loss"] != before.results["click"]["log_loss"]
