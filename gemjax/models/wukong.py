"""Wukong: stacked factorization machines (Zhang et al. 2024, arXiv 2403.02545).

  X_{i+1} = LN(concat(FMB_i(X_i), LCB_i(X_i)) + R_i(X_i))
  FMB(X)  = reshape_{nF x d}(MLP(LN(flatten(FM(X)))))
  LCB(X)  = W_L X
  ŷ       = MLP(flatten(X_l))

| choice                                                  | whose |
|---------------------------------------------------------|-------|
| FM basic, optimised X (Xᵀ Y), attentive Y(X)             | paper |
| R: identity, a linear map over units where shapes differ | paper |
| LN before FMB's MLP over all n k products                | paper |
| ReLU inside MLPs, none on the output of FMB              | paper |
| one head for each task on a shared trunk                 | paper |
| LN of a layer's output spans d, each unit alone          | ours  |
| widths of the attentive Y's MLP                          | ours  |
| variance 1 / fan-in for every weight, Y and W_L: fan-in n | ours  |
| dropout after each hidden layer, feature dropout on X0   | ours  |
| layers 2..l in one scan, unless config.compilation.unroll | ours  |

What open implementations do otherwise is off unless the config asks for it: a ReLU on the output
of FMB, a bias in R, batch norm in the head, another epsilon in the norms.
Inside, units lie last (gemjax/layers/interaction.py), and where R is a map it takes in W_L: what
both add to the last n_L units is X (W_R + [0 | W_L]).
Letters: B examples, D width of a unit, N units, T tasks.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from gemjax import config as config_lib
from gemjax.layers.dropout import Key, fold
from gemjax.layers.interaction import (
  FactorizationMachine,
  UnitLinear,
  map_together,
  units_flat,
  units_joined,
  units_last,
  units_turned,
)
from gemjax.layers.mlp import Mlp
from gemjax.layers.norm import EPS, FrozenBatchNorm, LayerNorm
from gemjax.layers.saved import ALL, Keeping, run, scan
from gemjax.models.heads import Heads

# Parameters of the scanned layers have an axis more.
STACKED = {nnx.PARTITION_NAME: None, "axes": "layer"}


class WukongLayer(nnx.Module):
  """One layer: (B, D, N) -> (B, D, nF + nL)."""

  def __init__(
    self,
    config: config_lib.Wukong,
    units: int,
    dim: int,
    dtype: str,
    rngs: nnx.Rngs,
    float8_mlp: bool = False,
  ):
    outputs = config.fmb_units + config.lcb_units
    # GEM, whose layers these are, too, has the paper's form alone.
    eps = getattr(config, "norm_eps", EPS)
    self.fm = FactorizationMachine(config.fm, units, dim, config.rank, dtype=dtype, rngs=rngs)
    self.fm_norm = LayerNorm(self.fm.outputs, dtype, rngs, eps=eps)
    self.mlp = Mlp(
      self.fm.outputs,
      config.mlp,
      config.fmb_units * dim,
      dtype=dtype,
      rngs=rngs,
      dropout=config.dropout,
      float8=float8_mlp,
    )
    self.compress = UnitLinear(units, config.lcb_units, dtype=dtype, rngs=rngs)
    bias = getattr(config, "residual_bias", False)
    mapped = lambda: UnitLinear(units, outputs, dtype=dtype, rngs=rngs, bias=bias)
    self.residual = None if units == outputs else mapped()
    self.norm = LayerNorm(dim, dtype, rngs, axis=1, eps=eps)
    self.fmb_units, self.lcb_units = config.fmb_units, config.lcb_units
    self.units, self.dim, self.dtype = units, dim, dtype
    self.relu = getattr(config, "fmb_relu", False)

  @jax.named_scope("wukong_layer")
  def __call__(self, x_BDN: jax.Array, key_B: Key = None) -> jax.Array:
    compress_NL, residual = self.compress.kernel_NL[...], self.residual
    residual_NM = residual and residual.kernel_NL[...]
    if residual and len(residual_NM) == len(compress_NL):  # Both whole or both shards: one map.
      residual_NM += jnp.pad(compress_NL, ((0, 0), (self.fmb_units, 0)))
      compress_NL = None
    kernels = [self.fm.mapped_by, compress_NL, residual_NM]
    mixed, compressed, base = map_together(x_BDN, kernels, self.units, self.dtype)
    base = x_BDN if base is None else base
    if residual and residual.bias_L is not None:
      base += residual.bias_L[...].astype(self.dtype)
    pairs_BI = self.fm_norm(self.fm(x_BDN, mixed, fold(key_B, 0)), self.units)
    fmb = units_last(self.mlp(pairs_BI, fold(key_B, 1), self.units, self.fmb_units), self.dim)
    fmb = jax.nn.relu(fmb) if self.relu else fmb
    if compressed is None:
      compressed = jnp.zeros((*fmb.shape[:2], self.lcb_units), fmb.dtype)
    return self.norm(units_joined(fmb, compressed) + base)


class Wukong(nnx.Module):
  """X0 -> one logit a task; see the module's docstring."""

  def __init__(
    self,
    config: config_lib.Wukong,
    *,
    units: int,
    dim: int,
    tasks: int,
    dtype: str,
    rngs: nnx.Rngs,
    keeping: Keeping = ALL,
    float8_mlp: bool = False,
  ):
    self.keeping = keeping
    outputs = config.fmb_units + config.lcb_units
    make = lambda units, rngs: WukongLayer(config, units, dim, dtype, rngs, float8_mlp)
    # Where X0 already has the shape of the others, every layer goes into the scan.
    self.first = None if units == outputs else make(units, rngs)
    self.depth = config.layers - (self.first is not None)
    stack = nnx.split_rngs(splits=max(1, self.depth))(
      nnx.vmap(lambda rngs: make(outputs, rngs), transform_metadata=STACKED)
    )
    self.layers = stack(rngs) if self.depth else None
    norm = lambda width: FrozenBatchNorm(width, dtype, config.norm_eps)
    self.heads = Heads(
      outputs * dim,
      config.head,
      tasks,
      config.dropout,
      dtype,
      rngs,
      norm if config.head_norm == "batch" else None,
      outer=outputs,
    )

  def __call__(self, x_BND: jax.Array, key_B: Key = None) -> jax.Array:
    x_BDN = units_turned(x_BND)
    kept = self.keeping
    if self.first is not None:
      x_BDN = run(kept, self.first, x_BDN, fold(key_B, 0), layer=0)
    if self.layers is not None:
      graph, weights = nnx.split(self.layers)

      def layer(weights, x_BDN, index, key_B):
        return nnx.merge(graph, weights)(x_BDN, fold(fold(key_B, 1), index))

      first = int(self.first is not None)
      x_BDN = scan(kept, layer, x_BDN, weights, key_B, first=first, unroll=2)
    return run(kept, self.heads, units_flat(x_BDN), fold(key_B, 2), last=True)
