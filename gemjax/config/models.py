"""The models, one dataclass each, and their laws."""

import dataclasses
from typing import Any

from gemjax.config.laws import one_of, real, widths
from gemjax.config.sequences import (
  Attention,
  Din,
  Gem,
  Hstu,
  InterFormer,
  Sasrec,
  validate_attention,
  validate_gem,
)
from gemjax.fields import need


@dataclasses.dataclass(kw_only=True, slots=True)
class Wukong:
  """Wukong (arXiv 2403.02545); see gemjax/models/wukong.py."""

  layers: int = 3
  fmb_units: int = 16  # n_F
  lcb_units: int = 16  # n_L
  rank: int = 8  # k
  fm: str = "optimised"  # basic | optimised | attentive
  mlp: tuple[int, ...] = (256,)
  head: tuple[int, ...] = (128,)
  # How open implementations differ from the paper, so that their weights can be read.
  fmb_relu: bool = False  # A ReLU on the output of FMB.
  residual_bias: bool = False
  head_norm: str = "none"  # none | batch: batch norm with frozen statistics in the head.
  norm_eps: float = 1e-6  # Of every norm; PyTorch has 1e-5.
  dropout: float = 0.0  # Of hidden activations.
  feature_dropout: float = 0.0  # Of whole units of the input.


@dataclasses.dataclass(kw_only=True, slots=True)
class Logistic:
  """Logistic regression; set embedding.dim to the number of tasks."""

  feature_dropout: float = 0.0


@dataclasses.dataclass(kw_only=True, slots=True)
class Fm:
  """Factorisation machine; the first `tasks` columns of a row are its linear weights."""

  feature_dropout: float = 0.0


@dataclasses.dataclass(kw_only=True, slots=True)
class Dlrm:
  """DLRM: pairwise dot products beside the dense unit, then an MLP."""

  head: tuple[int, ...] = (256, 128)
  dropout: float = 0.0
  feature_dropout: float = 0.0


@dataclasses.dataclass(kw_only=True, slots=True)
class Dcnv2:
  """DCN-V2, the parallel structure: cross layers beside an MLP."""

  layers: int = 3
  mlp: tuple[int, ...] = (256, 128)
  dropout: float = 0.0
  feature_dropout: float = 0.0


@dataclasses.dataclass(kw_only=True, slots=True)
class Mlp:
  """A plain deep network on the concatenated units (DNN of the BARS tables)."""

  head: tuple[int, ...] = (256, 128)
  dropout: float = 0.0
  feature_dropout: float = 0.0


Model = Wukong | Logistic | Fm | Dlrm | Dcnv2 | Mlp | Din | Sasrec | Hstu | InterFormer | Gem

# Numbers of a model that may be 0, which switches off what they count.
_OPTIONAL = {"memory_units", "recent", "pma", "interest"}


def validate_model(model: Any, dim: int, prefix: str = "model") -> None:
  """Raises ConfigError for the first field outside its law; `dim` is the width of a unit."""
  for field in dataclasses.fields(model):
    name, value = f"{prefix}.{field.name}", getattr(model, field.name)
    if isinstance(value, Attention):
      validate_attention(value, name, dim)
      # Blocks count from the oldest event: a candidate behind the newest may see none of them.
      alone = value.block and isinstance(model, Sasrec | Hstu)
      need(not alone, f"{name}.block", value.block, "0 where the candidate is the newest token")
      if isinstance(model, InterFormer):  # Its CLS tokens would hear the oldest events alone.
        for part in ("block", "window"):
          near = getattr(value, part)
          need(not near, f"{name}.{part}", near, "0 where CLS tokens lead every sequence")
    elif field.name in ("mlp", "head") or (isinstance(value, tuple) and field.name == "hidden"):
      widths(value, name)
      empty = isinstance(model, Dcnv2) and not value
      need(not empty, name, value, "a tuple of at least one width")
    elif field.name.endswith("dropout"):
      need(real(value) and value < 1, name, value, "in [0, 1)")
    elif field.name == "fm":
      one_of(value, name, "basic", "optimised", "attentive")
    elif field.name == "head_norm":
      one_of(value, name, "none", "batch")
    elif field.name == "norm_eps":
      need(real(value) and value > 0, name, value, "a finite number above 0")
    elif field.name == "gating":
      one_of(value, name, "sigmoid", "tanh", "identity", *(["none"] * isinstance(model, Gem)))
    elif field.name in _OPTIONAL:
      need(value >= 0, name, value, "at least 0")
    elif isinstance(value, int) and not isinstance(value, bool):
      need(value > 0, name, value, "positive")
  if isinstance(model, Gem):
    validate_gem(model, prefix)
