"""WuKong as FuxiCTR's model zoo defines it, in plain PyTorch; module names are those of its state.

Written from the formulas of model_zoo/WuKong/src/WuKong.py and fuxictr/pytorch/layers (MLP_Block,
FeatureEmbedding) of reczoo/FuxiCTR, commit 0245987.
"""

import torch
from torch import nn


class Stem(nn.Module):
  """`self.NAME = module`, nested: the names that wrap the modules of a state_dict."""

  def __init__(self, name: str, module: nn.Module):
    super().__init__()
    self.add_module(name, module)
    self.name = name

  def forward(self, x):
    return getattr(self, self.name)(x)


def mlp_block(inputs, hidden, outputs, *, relu=False, batch_norm=False, dropout=0.0):
  layers = []
  for width in hidden:
    layers.append(nn.Linear(inputs, width))
    layers += [nn.BatchNorm1d(width)] if batch_norm else []
    layers.append(nn.ReLU())
    layers += [nn.Dropout(dropout)] if dropout else []
    inputs = width
  layers.append(nn.Linear(inputs, outputs))
  return Stem("mlp", nn.Sequential(*layers, *([nn.ReLU()] if relu else [])))


class Embeddings(nn.Module):
  """Numeric features: x w; categorical ones: rows; in the order of `features`."""

  def __init__(self, features: dict[str, int], dim: int, shared: dict[str, str]):
    super().__init__()
    self.embedding_layers = nn.ModuleDict()
    for name, rows in features.items():
      if name in shared:
        self.embedding_layers[name] = self.embedding_layers[shared[name]]
      else:
        linear = nn.Linear(1, dim, bias=False)
        self.embedding_layers[name] = nn.Embedding(rows, dim) if rows else linear
    self.features = features

  def forward(self, dense, ids):
    dense, ids = iter(dense.T), iter(ids.T)
    rows = [
      self.embedding_layers[name](next(ids) if size else next(dense)[:, None])
      for name, size in self.features.items()
    ]
    return torch.stack(rows, 1)


class Fmb(nn.Module):
  def __init__(self, units, outputs, dim, rank, hidden, dropout):
    super().__init__()
    if rank:
      self.proj_Y = nn.Parameter(torch.randn(units, rank))
    width = units * (rank or units)
    self.layer_norm = nn.LayerNorm(width)
    self.mlp = mlp_block(width, hidden, outputs * dim, relu=True, dropout=dropout)
    self.outputs, self.dim = outputs, dim

  def forward(self, x):
    other = x.mT @ self.proj_Y if hasattr(self, "proj_Y") else x.mT
    return self.mlp(self.layer_norm((x @ other).flatten(1))).view(-1, self.outputs, self.dim)


class Layer(nn.Module):
  def __init__(self, units, *, fmb, lcb, dim, rank, hidden, dropout):
    super().__init__()
    self.fmb = Fmb(units, fmb, dim, rank, hidden, dropout)
    self.lcb = Stem("linear", nn.Linear(units, lcb, bias=False))
    self.layer_norm = nn.LayerNorm(dim)
    if units != fmb + lcb:
      self.residual_proj = nn.Linear(units, fmb + lcb)

  def forward(self, x):
    out = torch.cat([self.fmb(x), self.lcb(x.mT).mT], 1)
    rest = self.residual_proj(x.mT).mT if hasattr(self, "residual_proj") else x
    return self.layer_norm(out + rest)


class WuKong(nn.Module):
  """(dense, ids) -> logits; FuxiCTR puts a sigmoid behind, which has no weights."""

  def __init__(self, features, *, shared=None, dim, layers, fmb, lcb, rank, hidden, head,
               batch_norm, dropout=0.0):  # fmt: skip
    super().__init__()
    embeddings = Embeddings(features, dim, shared or {})
    self.embedding_layer = Stem("embedding_layer", embeddings)
    make = lambda units: Layer(
      units, fmb=fmb, lcb=lcb, dim=dim, rank=rank, hidden=hidden, dropout=dropout
    )
    widths = [len(features)] + [fmb + lcb] * (layers - 1)
    self.wukong_stack = nn.Sequential(*[make(units) for units in widths])
    self.fc = mlp_block((fmb + lcb) * dim, head, 1, batch_norm=batch_norm)

  def forward(self, dense, ids):
    x = self.embedding_layer.embedding_layer(dense, ids)
    return self.fc(self.wukong_stack(x).flatten(1))[:, 0]
