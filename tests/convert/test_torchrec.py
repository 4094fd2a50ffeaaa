"""Tables of TorchRec with row-wise AdaGrad's state: to the bit, fused or sharded, both ways."""

import dataclasses
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import small
from runs import config_of, convert, restored

REASON = "needs torchrec and fbgemm-gpu-cpu 1.8.0 with torch 2.13.0, which it is tested with"
torch = pytest.importorskip("torch", reason=REASON)
torchrec = pytest.importorskip("torchrec", reason=REASON)

from torch.distributed.checkpoint import format_utils  # noqa: E402

SIZES = {"user": 90, "item": 70, "hour": 26}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  return small.write_data(tmp_path_factory.mktemp("small") / "data", SIZES)


def tables(run):
  """Table -> (rows, v) of a run, by the law of gemjax/embedding/tables.py."""
  trainer, state, _ = restored(run)
  found = {}
  for table, size in SIZES.items():
    stack, offset = trainer.tables.layout.positions(table)
    at = (offset + np.arange(size)) * stack.multiplier % stack.rows
    arrays = state.stacks[stack.name]
    found[table] = np.asarray(arrays.rows_RW)[at], np.asarray(arrays.slots["v"])[at]
  return found


def fused():
  from torchrec import EmbeddingBagConfig
  from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection

  torch.manual_seed(0)
  return FusedEmbeddingBagCollection(
    tables=[
      EmbeddingBagConfig(name=n, embedding_dim=small.DIM, num_embeddings=r, feature_names=[n])
      for n, r in SIZES.items()
    ],
    optimizer_type=torchrec.optim.RowWiseAdagrad,
    optimizer_kwargs={"lr": 0.1, "eps": 1e-8},
    device=torch.device("cpu"),
  )


def look_up(bags, ids):
  """(B, tables * D) of ids (B, tables)."""
  values = torch.from_numpy(ids.T.reshape(-1).copy()).long()
  keyed = torchrec.KeyedJaggedTensor(list(SIZES), values, lengths=torch.ones_like(values))
  return bags(keyed).values()


def test_a_fused_collection_there_and_back(data, tmp_path):
  bags = fused()
  for seed in range(4):
    look_up(bags, small.columns(16, seed, SIZES)["ids"]).square().sum().backward()
  optimizer = bags.fused_optimizer().state_dict()
  file, run, back = tmp_path / "bags.pt", tmp_path / "run", tmp_path / "back.pt"
  torch.save({"model": bags.state_dict(), "optimizer": optimizer}, file)
  lines = convert("torchrec", "gemjax", file, run, config=config_of("gemjax", data), verify=True)
  assert any("model.first.fm.y_NK" in line and "initialised" in line for line in lines)
  for name, (rows, v) in tables(run).items():
    np.testing.assert_array_equal(rows, bags.state_dict()[f"embedding_bags.{name}.weight"])
    want = optimizer["state"][f"{name}.weight"][f"{name}.weight.momentum_1"]
    assert (want > 0).any()
    np.testing.assert_array_equal(v, want)
  convert("gemjax", "torchrec", run, back, verify=True)
  found = torch.load(back, weights_only=True)
  other = torchrec.EmbeddingBagCollection(
    tables=[dataclasses.replace(c) for c in bags.embedding_bag_configs()]
  )
  other.load_state_dict(found["model"])  # Strict.
  ids = small.columns(32, 9, SIZES)["ids"]
  assert torch.equal(look_up(other, ids), look_up(bags, ids))
  for name in SIZES:
    key = f"embedding_bags.{name}.weight"
    v = found["optimizer"]["state"][key][f"{name}.momentum1"]
    assert torch.equal(v, optimizer["state"][f"{name}.weight"][f"{name}.weight.momentum_1"])


def test_what_is_not_of_our_tables_is_said_to_be_left_out(data, tmp_path):
  """Other tables, dense layers, and slots that the config's optimiser does not have."""
  sparse, state = "model.sparse.embedding_bags", "optimizer.state.sparse.embedding_bags"
  v = {f"{state}.{n}.weight.{n}.momentum1": torch.rand(rows) for n, rows in SIZES.items()}
  other = {
    f"{sparse}.campaign.weight": torch.ones(50, 8),
    "model.over_arch.0.weight": torch.ones(4, 4),
    f"{state}.user.weight.user.momentum2": torch.rand(90, 8),
  }
  weights = {f"{sparse}.{n}.weight": torch.ones(r, small.DIM) for n, r in SIZES.items()}
  file = tmp_path / "x.pt"
  torch.save(weights | v | other, file)
  for optimizer, wanted in (("rowwise_adagrad", [*other]), ("lazy_adam", [*v, *other])):
    config = config_of("gemjax", data, {"optimizer": optimizer})
    lines = convert("torchrec", "gemjax", file, tmp_path / optimizer, config=config, verify=True)
    left = [line.split()[0] for line in lines if line.endswith("left out")]
    assert sorted(left) == sorted(wanted)
    said = {line.split()[0]: line for line in lines}
    assert said["tables.user.rows"].endswith("copied")


def test_a_sharded_collection_there_and_back(data, tmp_path):
  """Trained on two processes, converted there and back, restored on three: the same bits."""

  def sharded(what, world):
    script = pathlib.Path(__file__).with_name("torchrec_sharded.py")
    done = subprocess.run(
      [sys.executable, script, what, tmp_path, str(world)], capture_output=True, text=True,
      timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]

  def saved(name):
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

    return _load_state_dict_from_keys(checkpoint_id=tmp_path / name)

  sharded("train", 2)
  trained = saved("trained")
  run, back = tmp_path / "run", tmp_path / "back.pt"
  config = config_of("gemjax", data)
  convert("torchrec", "gemjax", tmp_path / "trained", run, config=config, verify=True)
  for name, (rows, v) in tables(run).items():
    key = f"embedding_bags.{name}.weight"
    np.testing.assert_array_equal(rows, trained["model"][key])
    want = trained["optimizer"]["state"][key][f"{name}.momentum1"]
    assert (want > 0).any()
    np.testing.assert_array_equal(v, want)
  convert("gemjax", "torchrec", run, back, verify=True)
  format_utils.torch_save_to_dcp(back, tmp_path / "converted")
  sharded("restore", 3)
  again = saved("restored")
  for name in SIZES:
    key = f"embedding_bags.{name}.weight"
    assert torch.equal(again["model"][key], trained["model"][key])
    v, want = (x["optimizer"]["state"][key][f"{name}.momentum1"] for x in (again, trained))
    assert torch.equal(v, want)
