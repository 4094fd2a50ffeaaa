"""Gating against InterFormer's equation."""

import numpy as np
import pytest
from flax import nnx
from sequence_case import DIM, Case
from sequence_oracle import mlp

from gemjax.layers.gating import Gating

ACTIVATIONS = {"sigmoid": lambda x: 1 / (1 + np.exp(-x)), "tanh": np.tanh, "identity": lambda x: x}


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_equation(kind):
  """act(X * MLP(X)): a second factor X, and the activation around both."""
  case = Case(
    Gating(kind, DIM, dtype="float32", rngs=nnx.Rngs(2)),
    lambda module, tokens, _: module(tokens.x_ED.reshape(12, 2, DIM)).reshape(24, DIM),
    lambda w, x, age, _: ACTIVATIONS[kind](x * mlp(x, w["mlp"])),
  )
  case.check_values()
  case.check_gradients()
