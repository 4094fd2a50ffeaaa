"""Wukong's training step in plain PyTorch, a peer of suite `train_step`.

Same formulas as gemjax/models/wukong.py: optimised FM, LN over the width, ReLU MLPs, a linear
residual where shapes differ; Adam for dense weights, exact row-wise AdaGrad for the table.
Letters: B examples, S fields, N units, D width of a unit, K rank, R rows, M looked-up rows.
"""

from __future__ import annotations

import itertools

import numpy as np

try:
  import torch
  from torch import nn
except ImportError as error:
  raise ImportError("this suite needs PyTorch: pip install 'gemjax[benchmark]'") from error

FIELDS, ROWS, DIM, BATCH = 39, 1_000_000, 64, 4096
LAYERS, FMB_UNITS, LCB_UNITS, RANK = 3, 40, 40, 8
MLP, HEAD = (512, 256), (512, 256)
DENSE_RATE, TABLE_RATE, EPS = 1e-3, 0.05, 1e-8
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
torch.backends.cuda.matmul.allow_tf32 = True  # As JAX multiplies float32 on a GPU.
WARMUP = 1000  # Steps over which both learning rates rise in a line, as in the paper.


class TorchWukong(nn.Module):
  """ids_BS -> logits_B; every field is one unit of width `dim` from one table."""

  def __init__(self, *, rows: int = ROWS, fields: int = FIELDS, dim: int = DIM):
    super().__init__()
    self.table = nn.Embedding(rows, dim, sparse=True)
    nn.init.normal_(self.table.weight, std=0.01)
    units = FMB_UNITS + LCB_UNITS
    self.layers = nn.ModuleList(
      [WukongLayer(n, dim) for n in (fields, *itertools.repeat(units, LAYERS - 1))]
    )
    self.head = mlp(units * dim, HEAD, 1)

  def forward(self, ids_BS: torch.Tensor) -> torch.Tensor:
    x_BND = self.table(ids_BS)
    for layer in self.layers:
      x_BND = layer(x_BND)
    return self.head(x_BND.flatten(1)).squeeze(1)

  def weights(self) -> dict[str, np.ndarray]:
    """A copy of every weight, by the names of `state_dict`."""
    return {name: weight.numpy(force=True).copy() for name, weight in self.state_dict().items()}

  def load_weights(self, weights: dict[str, np.ndarray]) -> None:
    """Inverse of `weights`; raises RuntimeError naming what is missing, left over or misshapen."""
    self.load_state_dict({name: torch.tensor(weight) for name, weight in weights.items()})


class WukongLayer(nn.Module):
  """LN(concat(FMB(X), LCB(X)) + R(X)): (B, N, D) -> (B, nF + nL, D)."""

  def __init__(self, units: int, dim: int):
    super().__init__()
    outputs = FMB_UNITS + LCB_UNITS
    over_units = lambda rows: nn.Parameter(torch.randn(rows, units) / units**0.5)
    self.y_KN = over_units(RANK)
    self.compress_LN = over_units(LCB_UNITS)
    self.residual_ON = None if units == outputs else over_units(outputs)
    # flax's epsilon, so that both sides compute the same.
    self.fm_norm = nn.LayerNorm(units * RANK, eps=1e-6)
    self.mlp = mlp(units * RANK, MLP, FMB_UNITS * dim)
    self.norm = nn.LayerNorm(dim, eps=1e-6)

  def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
    batch, _, dim = x_BND.shape
    # One batched product for all that mixes units: fastest of the eager forms we tried, among
    # them one product a matrix, einsum, and units as the leading axis.
    maps = [self.y_KN, self.compress_LN]
    if self.residual_ON is not None:
      maps.append(self.residual_ON)
    mixed_BXD = torch.bmm(torch.cat(maps).expand(batch, -1, -1), x_BND)
    mixed_BKD, compressed_BLD, residual_BOD = mixed_BXD.tensor_split((RANK, RANK + LCB_UNITS), 1)
    pairs_BNK = torch.bmm(x_BND, mixed_BKD.mT)
    fmb_BFD = self.mlp(self.fm_norm(pairs_BNK.flatten(1))).view(batch, FMB_UNITS, dim)
    residual_BOD = x_BND if self.residual_ON is None else residual_BOD
    return self.norm(torch.cat([fmb_BFD, compressed_BLD], 1) + residual_BOD)


def mlp(inputs: int, hidden: tuple[int, ...], outputs: int) -> nn.Sequential:
  """ReLU after every hidden layer, none after the last."""
  layers = []
  for width in hidden:
    layers += [nn.Linear(inputs, width), nn.ReLU()]
    inputs = width
  return nn.Sequential(*layers, nn.Linear(inputs, outputs))


class RowwiseAdagrad:
  """Exact row-wise AdaGrad on a table's sparse gradient, duplicates summed first.

  v_r += mean_d(g_rd^2); w_r -= lr g_r / (sqrt(v_r) + eps)
  """

  def __init__(self, table_RD: nn.Parameter):
    self.table_RD, self.v_R = table_RD, torch.zeros(len(table_RD), device=DEVICE)

  @torch.no_grad()
  def step(self, learning_rate: float) -> None:
    grad = self.table_RD.grad.coalesce()
    ids_M, grad_MD = grad.indices()[0], grad.values()
    v_M = self.v_R[ids_M] + grad_MD.square().mean(1)
    self.v_R[ids_M] = v_M
    scale_M = -learning_rate / (v_M.sqrt() + EPS)
    self.table_RD.index_add_(0, ids_M, grad_MD * scale_M[:, None])
    self.table_RD.grad = None


class TorchTrainer:
  """A model and its two optimisers; `half` computes in bfloat16 as torch.autocast does."""

  def __init__(self, model: TorchWukong, *, half: bool = False):
    self.model, self.half = model, half
    self.table = RowwiseAdagrad(model.table.weight)
    dense = [w for w in model.parameters() if w is not model.table.weight]
    self.dense = torch.optim.Adam(dense, fused=True)
    self.steps = 0

  def step(self, ids_BS: np.ndarray, label_B: np.ndarray) -> float:
    """Trains one batch; returns its mean log loss before the update."""
    with torch.autocast(DEVICE, torch.bfloat16, enabled=self.half):
      logits_B = self.model(torch.from_numpy(ids_BS).to(DEVICE)).float()
    label_B = torch.from_numpy(label_B).to(DEVICE)
    loss = nn.functional.binary_cross_entropy_with_logits(logits_B, label_B)
    loss.backward()
    self.steps += 1
    share = min(1.0, self.steps / WARMUP)
    self.dense.param_groups[0]["lr"] = DENSE_RATE * share
    self.dense.step()
    self.dense.zero_grad()
    self.table.step(TABLE_RATE * share)
    return loss.item()


def trainer_of(weights: dict[str, np.ndarray], rows: int, half: bool = False) -> TorchTrainer:
  """A trainer that starts from `weights`."""
  model = TorchWukong(rows=rows)
  model.load_weights(weights)
  return TorchTrainer(model.to(DEVICE), half=half)
