"""MaskNet against InterFormer's equation."""

from flax import nnx
from sequence_case import Case
from sequence_oracle import linear, mlp

from gemjax.layers.masknet import MaskNet


def test_equation():
  """MLP_lce(S * MLP_mask(S)), of three sequences of width 4."""
  case = Case(
    MaskNet(3, 4, dtype="float32", rngs=nnx.Rngs(1)),
    lambda module, tokens, _: module(tokens.x_ED),
    lambda w, x, age, _: linear(x * mlp(x, w["mask"]), w["lce"]),
    dim=12,
  )
  assert case.run()[0].shape == (18, 4)
  case.check_values()
  case.check_gradients()
