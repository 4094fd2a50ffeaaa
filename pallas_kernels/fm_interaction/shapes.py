"""Named shapes of fm_interaction: the Wukongs of arXiv 2403.02545 and of configs/."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax

from pallas_kernels.case import Case
from pallas_kernels.fm_interaction import triton


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
  """B examples of N units of width D, rank K; Y learnt, or of each example (attentive)."""

  units: int
  width: int
  rank: int
  batch: int = 2048  # Of one GPU of 128, where 262,144 examples are a batch.
  attentive: bool = False
  dtype: str = "bfloat16"

  def args(self) -> tuple[jax.ShapeDtypeStruct, ...]:
    """x, y, scale, bias and the gradient of the output."""
    y = (self.units, self.rank)
    features = (self.units * self.rank,)
    y = ((self.batch, *y), self.dtype) if self.attentive else (y, "float32")
    x = ((self.batch, self.units, self.width), self.dtype)
    out = ((self.batch, *features), self.dtype)
    learnt = (features, "float32")
    return tuple(jax.ShapeDtypeStruct(*s) for s in (x, y, learnt, learnt, out))


SHAPES = {
  "criteo_first_n28_k8_d16": Shape(units=28, rank=8, width=16),
  "criteo_n16_k8_d16": Shape(units=16, rank=8, width=16),
  "criteo_tb_first_n39_k24_d128": Shape(units=39, rank=24, width=128),
  "criteo_tb_n32_k24_d128": Shape(units=32, rank=24, width=128),
  "paper_n16_k24_d160": Shape(units=16, rank=24, width=160),
  "paper_n64_k24_d160": Shape(units=64, rank=24, width=160),
  "paper_n96_k48_d160": Shape(units=96, rank=48, width=160),
  "paper_n192_k96_d160": Shape(units=192, rank=96, width=160),
  "paper_first_n720_k96_d160": Shape(units=720, rank=96, width=160),
  "paper_n384_k192_d160": Shape(units=384, rank=192, width=160),
  "attentive_n16_k8_d16": Shape(units=16, rank=8, width=16, attentive=True),
  "attentive_n32_k24_d128": Shape(units=32, rank=24, width=128, attentive=True),
  "attentive_n192_k96_d160": Shape(units=192, rank=96, width=160, attentive=True),
  "paper_n64_k24_d160_fp16": Shape(units=64, rank=24, width=160, dtype="float16"),
  "paper_n192_k96_d160_fp16": Shape(units=192, rank=96, width=160, dtype="float16"),
  "criteo_n16_k8_d16_f32": Shape(units=16, rank=8, width=16, dtype="float32"),
  "criteo_tb_n32_k24_d128_f32": Shape(units=32, rank=24, width=128, dtype="float32"),
  "paper_n192_k96_d160_f32": Shape(units=192, rank=96, width=160, dtype="float32"),
}


def forward(x_BND, y, scale_F, bias_F):
  """The kernel, compiled."""
  return triton.forward(x_BND, y, scale_F, bias_F, eps=1e-6, interpret=False)


def backward(x_BND, y, scale_F, bias_F, gradient_BF):
  """The kernel's gradients, compiled."""
  return triton.backward(x_BND, y, scale_F, bias_F, gradient_BF, eps=1e-6, interpret=False)


def report_cases() -> Iterator[Case]:
  """Both kernels at every named shape."""
  for name, shape in SHAPES.items():
    for direction, fn in (("forward", forward), ("backward", backward)):
      args = shape.args()
      yield Case(
        op="fm_interaction",
        implementation="triton",
        direction=direction,
        shape=name,
        fn=fn,
        args=args if direction == "backward" else args[:-1],
        kernels={f"fm_interaction_{direction}": True},
      )
