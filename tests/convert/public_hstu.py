"""HSTU of generative-recommenders in plain PyTorch, padded; module names are those of its state.

Written from the formulas of generative_recommenders/research/modeling/sequential (hstu.py,
embedding_modules.py, input_features_preprocessors.py, output_postprocessors.py) of
facebookresearch/generative-recommenders, commit 2e81fab, without its jagged operations of FBGEMM.
"""

import torch
from torch import nn
from torch.nn import functional as F


class Holder(nn.Module):
  """`self.NAME = module`, a name that wraps a module's."""

  def __init__(self, **modules):
    super().__init__()
    for name, module in modules.items():
      self.add_module(name, module)


class Bias(nn.Module):
  def __init__(self, places, buckets=128):
    super().__init__()
    self._ts_w = nn.Parameter(torch.empty(buckets + 1).normal_(0, 0.02))
    self._pos_w = nn.Parameter(torch.empty(2 * places - 1).normal_(0, 0.02))
    self.places, self.buckets = places, buckets

  def forward(self, time_BN):
    n = self.places
    t = F.pad(self._pos_w[: 2 * n - 1], [0, n]).repeat(n)
    t = t[..., :-n].reshape(1, n, 3 * n - 2)
    r = (2 * n - 1) // 2
    longer = torch.cat([time_BN, time_BN[:, n - 1 : n]], dim=1)
    apart = longer[:, 1:].unsqueeze(2) - longer[:, :-1].unsqueeze(1)
    bucket = (torch.log(torch.abs(apart).clamp(min=1)) / 0.301).long()
    bucket = torch.clamp(bucket, min=0, max=self.buckets)
    return t[:, :, r:-r] + self._ts_w[bucket.view(-1)].view(len(time_BN), n, n)


class Layer(nn.Module):
  def __init__(self, dim, heads, places):
    super().__init__()
    self._uvqk = nn.Parameter(torch.empty(dim, 4 * dim).normal_(0, 0.02))
    self._rel_attn_bias = Bias(places)
    self._o = nn.Linear(dim, dim)
    self.dim, self.heads = dim, heads

  def forward(self, x_BND, time_BN, sees_NN):
    B, n, _ = x_BND.shape
    norm = lambda x: F.layer_norm(x, [self.dim], eps=1e-6)
    uvqk = F.silu(norm(x_BND) @ self._uvqk)
    u, v, q, k = torch.split(uvqk, [self.dim] * 4, dim=-1)
    q, k, v = (x.view(B, n, self.heads, -1) for x in (q, k, v))
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k)
    scores = F.silu(scores + self._rel_attn_bias(time_BN).unsqueeze(1)) / n * sees_NN
    attended = torch.einsum("bhnm,bmhd->bnhd", scores, v).reshape(B, n, -1)
    return self._o(u * norm(attended)) + x_BND


class Hstu(nn.Module):
  """(ids, times) -> queries of length 1; id 0 pads behind a history, whose next time follows it."""

  def __init__(self, *, items, dim, layers, heads, places):
    super().__init__()
    self._embedding_module = Holder(_item_emb=nn.Embedding(items + 1, dim, padding_idx=0))
    self._input_features_preproc = Holder(_pos_emb=nn.Embedding(places, dim))
    blocks = nn.ModuleList(Layer(dim, heads, places) for _ in range(layers))
    self._hstu = Holder(_attention_layers=blocks)
    mask = torch.triu(torch.ones((places, places), dtype=torch.bool), diagonal=1)
    self.register_buffer("_attn_mask", mask)
    self.dim = dim

  def forward(self, id_BN, time_BN):
    x = self._embedding_module._item_emb(id_BN) * self.dim**0.5
    x = x + self._input_features_preproc._pos_emb(torch.arange(id_BN.shape[1]))
    there = (id_BN != 0).unsqueeze(-1).float()
    x = x * there
    sees = 1.0 - self._attn_mask.float()
    for layer in self._hstu._attention_layers:
      x = layer(x, time_BN, sees) * there
    return x / torch.clamp(torch.linalg.norm(x, dim=-1, keepdim=True), min=1e-6)

  def cosines(self, x_BND):
    item = self._embedding_module._item_emb.weight
    item = item / torch.clamp(torch.linalg.norm(item, dim=-1, keepdim=True), min=1e-6)
    return x_BND @ item.T
