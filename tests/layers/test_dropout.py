"""Masks depend on the example's key alone."""

import jax
import jax.numpy as jnp
import numpy as np

from gemjax.layers.dropout import dropout, example_keys, fold, unit_dropout

KEY = jax.random.key(5)
X_BND = jnp.ones((64, 20, 8))


def test_the_part_of_a_device_is_what_one_device_draws():
  def masks(keys_B, x):
    keys_B = fold(keys_B, 3)
    return dropout(x, 0.4, fold(keys_B, 0)), unit_dropout(x, 0.4, fold(keys_B, 1))

  whole = masks(example_keys(KEY, 0, 64), X_BND)
  for first in (0, 16, 48):
    part = masks(example_keys(KEY, first, 16), X_BND[first : first + 16])
    for a, b in zip(part, whole):
      np.testing.assert_array_equal(a, b[first : first + 16])


def test_examples_parts_and_steps_draw_apart():
  keys = [example_keys(KEY, 0, 64), fold(example_keys(KEY, 0, 64), 1)]
  keys.append(example_keys(jax.random.key(6), 0, 64))
  masks = np.concatenate([np.asarray(dropout(X_BND, 0.5, k)).reshape(64, -1) for k in keys])
  assert len(np.unique(masks, axis=0)) == 3 * 64
  # Independent masks of 160 fair coins agree in 80 of them, standard deviation 6.3.
  agree = (masks[:, None] == masks[None]).sum(-1)[np.triu_indices(3 * 64, k=1)]
  assert agree.min() > 30 and agree.max() < 130


def test_the_share_dropped_and_the_scale():
  y = np.asarray(dropout(X_BND, 0.25, example_keys(KEY, 0, 64)))
  assert set(np.unique(y)) == {0, np.float32(1 / 0.75)}
  # 10,240 coins: standard deviation 0.0043.
  assert abs((y == 0).mean() - 0.25) < 0.02
  units = np.asarray(unit_dropout(X_BND, 0.25, example_keys(KEY, 0, 64)))
  assert np.all(units == units[:, :, :1])
  assert abs((units[:, :, 0] == 0).mean() - 0.25) < 0.06


def test_without_keys_nothing_is_dropped():
  assert fold(None, 1) is None
  np.testing.assert_array_equal(dropout(X_BND, 0.5, None), X_BND)
  np.testing.assert_array_equal(unit_dropout(X_BND, 0.0, example_keys(KEY, 0, 64)), X_BND)
