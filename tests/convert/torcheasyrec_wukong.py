"""WuKong as TorchEasyRec defines it, in plain PyTorch; module names are those of its state.

Written from the formulas of tzrec/models/wukong.py and tzrec/modules (interaction.py, mlp.py) of
alibaba/TorchEasyRec, commit 54cac31.
"""

import itertools

import torch
from torch import nn


class Perceptron(nn.Module):
  def __init__(self, inputs, outputs):
    super().__init__()
    self.perceptron = nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU())

  def forward(self, x):
    return self.perceptron(x)


class Mlp(nn.Module):
  """A ReLU behind every layer, the last one too."""

  def __init__(self, *widths):
    super().__init__()
    self.mlp = nn.ModuleList([Perceptron(a, b) for a, b in itertools.pairwise(widths)])

  def forward(self, x):
    for layer in self.mlp:
      x = layer(x)
    return x


class Compress(nn.Module):
  def __init__(self, units, outputs):
    super().__init__()
    self.weight = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(units, outputs)))

  def forward(self, x):
    return (x.mT @ self.weight).mT


class Fmb(nn.Module):
  def __init__(self, dim, units, outputs, rank, hidden):
    super().__init__()
    self.weight = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(units, rank)))
    self.norm = nn.LayerNorm(units * rank)
    self.mlp = Mlp(units * rank, *hidden)
    self.feature_out_liner = nn.Linear(hidden[-1], outputs * dim)
    self.outputs, self.dim = outputs, dim

  def forward(self, x):
    products = (x @ (x.mT @ self.weight)).flatten(1)
    return self.feature_out_liner(self.mlp(self.norm(products))).view(-1, self.outputs, self.dim)


class Layer(nn.Module):
  def __init__(self, dim, units, *, lcb, fmb, rank, hidden):
    super().__init__()
    self.lcb, self.fmb = Compress(units, lcb), Fmb(dim, units, fmb, rank, hidden)
    self.norm = nn.LayerNorm(dim)
    self.residual_projection = nn.Identity() if units == lcb + fmb else Compress(units, lcb + fmb)

  def forward(self, x):
    return self.norm(torch.cat([self.fmb(x), self.lcb(x)], 1) + self.residual_projection(x))


class WuKong(nn.Module):
  """(dense, ids) -> logits; `tables` are an EmbeddingBagCollection's, FEATURE_emb to rows."""

  def __init__(self, features, tables, *, dense, dense_mlp, dim, layers, fmb, lcb, rank, hidden,
               head):  # fmt: skip
    super().__init__()
    wrap = lambda **modules: nn.ModuleDict(modules)
    bags = {f"{name}_emb": nn.EmbeddingBag(rows, dim, mode="sum") for name, rows in tables.items()}
    ebc = wrap(ebc=wrap(embedding_bags=nn.ModuleDict(bags)))
    self.embedding_group = wrap(emb_impls=wrap(__BASE__=ebc))
    self.dense_mlp = Mlp(dense, *dense_mlp, dim)
    make = lambda units: Layer(dim, units, lcb=lcb, fmb=fmb, rank=rank, hidden=hidden)
    units = [len(features) + 1] + [fmb + lcb] * (layers - 1)
    self._wukong_layers = nn.ModuleList([make(n) for n in units])
    self.final_mlp = Mlp((fmb + lcb) * dim, *head)
    self.output_mlp = nn.Linear(head[-1], 1)
    self.features, self.bags = features, bags

  def forward(self, dense, ids):
    rows = [self.bags[f"{table}_emb"](i[:, None]) for table, i in zip(self.features, ids.T)]
    x = torch.stack([self.dense_mlp(dense), *rows], 1)
    for layer in self._wukong_layers:
      x = layer(x)
    return self.output_mlp(self.final_mlp(x.flatten(1)))[:, 0]
