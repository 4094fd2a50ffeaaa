"""QK-norm and rotary positions: gradients against differences of the formula in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from pallas_kernels.jagged_attention.rotary import prepare


@pytest.mark.parametrize("base", [None, 100.0])
def test_gradients_are_those_of_differences(base):
  with jax.enable_x64(True):
    rng = np.random.default_rng(0)
    x_THD, gain_D = jnp.asarray(rng.normal(size=(5, 2, 8))), jnp.asarray(rng.uniform(0.5, 2, 8))
    position_T = jnp.array([0, 1, 2, 7, 3], jnp.int32)
    of = lambda x, gain: prepare(x, gain, position_T, base)
    check_grads(of, (x_THD, gain_D), order=1, modes=("rev",), atol=1e-7, rtol=1e-7)
    check_grads(lambda x: prepare(x, None, position_T, base), (x_THD,), order=1, modes=("rev",))
