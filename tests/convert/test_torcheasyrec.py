"""TorchEasyRec's WuKong, trained in plain PyTorch: its logits here, its bits on the way back."""

import numpy as np
import pytest
import small
from runs import config_of, convert, logits

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[convert]'")

import torch.distributed.checkpoint as dcp  # noqa: E402
from torch_training import logits_of_test, trained  # noqa: E402
from torcheasyrec_wukong import WuKong  # noqa: E402


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize(
  "change",
  [
    pytest.param({}, id="identity", marks=pytest.mark.slow),
    pytest.param({"lcb_units": 5}, id="map"),
  ],
)
def test_its_logits_here_and_its_bits_on_the_way_back(data, tmp_path, change):
  """Its checkpoints are folders of torch.distributed.checkpoint with "model." in front of names."""
  config = config_of("torcheasyrec", data, **change)
  model = config.model
  torch.manual_seed(1)
  tables = {name: size for name, size in small.SIZES.items() if name != "seen"}
  peer = trained(
    WuKong(
      ["user", "item", "item", "hour"], tables, dense=len(small.DENSE),
      dense_mlp=config.embedding.dense_mlp, dim=small.DIM, layers=model.layers, fmb=model.fmb_units,
      lcb=model.lcb_units, rank=model.rank, hidden=model.mlp, head=model.head,
    )
  )  # fmt: skip
  weights = {f"model.{name}": tensor for name, tensor in peer.state_dict().items()}
  folder, run, back = tmp_path / "model", tmp_path / "run", tmp_path / "back.pt"
  dcp.save(weights, checkpoint_id=folder, no_dist=True)
  convert("torcheasyrec", "gemjax", folder, run, config=config, verify=True)
  want = logits_of_test(peer)
  assert np.std(want) > 0.05
  np.testing.assert_allclose(logits(run, "test")[:, 0], want, rtol=0, atol=1e-5)
  convert("gemjax", "torcheasyrec", run, back, verify=True)
  found = torch.load(back, weights_only=True)
  assert found.keys() == peer.state_dict().keys()
  for name, tensor in peer.state_dict().items():
    assert torch.equal(found[name], tensor), name
