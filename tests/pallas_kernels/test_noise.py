"""The noise of stochastic rounding: uniform bits, of each other independent as far as is seen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import noise

SIDE = 512


def drawn(seed: int) -> np.ndarray:
  words = noise.words_of("test", jax.random.key(seed))
  iota = lambda axis: jax.lax.broadcasted_iota(jnp.int32, (SIDE, SIDE), axis)
  return np.asarray(noise.random_bits(words[0], words[1], iota(0), iota(1)))


def correlation(a, b) -> float:
  """In units of its standard deviation where there is none."""
  a, b = (x.astype(np.float64).ravel() for x in (a, b))
  return np.corrcoef(a, b)[0, 1] * np.sqrt(a.size)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bits_are_uniform(seed):
  bits = drawn(seed)
  ones = (bits[..., None] >> np.arange(32, dtype=np.uint32)) & 1
  deviation = (ones.mean((0, 1)) - 0.5) * 2 * SIDE
  assert np.abs(deviation).max() < 5  # Of 32 normal numbers.
  counts, _ = np.histogram(bits, 256, (0, 2**32))
  chi = ((counts - SIDE**2 / 256) ** 2).sum() / (SIDE**2 / 256)
  assert abs(chi - 255) < 5 * np.sqrt(2 * 255)
  # As many values twice as a birthday finds among 2^32.
  repeated = bits.size - len(np.unique(bits))
  assert abs(repeated - SIDE**4 / 2**33) < 5 * np.sqrt(SIDE**4 / 2**33) + 1


def test_neighbours_keys_and_bits_do_not_correlate():
  a, b = drawn(0), drawn(1)
  pairs = [(a[1:], a[:-1]), (a[:, 1:], a[:, :-1]), (a[::2], a[1::2]), (a, b), (a, a.T)]
  pairs += [((a >> i) & 1, (a >> j) & 1) for i in range(0, 32, 5) for j in range(i + 1, 32, 3)]
  pairs += [((a[1:] >> i) & 1, (a[:-1] >> i) & 1) for i in range(32)]
  assert max(abs(correlation(*pair)) for pair in pairs) < 5


def test_a_bit_of_the_place_or_the_key_changes_half_of_the_noise():
  row, column = np.arange(4_096, dtype=np.uint32), np.full(4_096, 77, np.uint32)
  word = np.asarray(noise.words_of("test", jax.random.key(3)))
  base = [word[0], word[1], row, column]
  before = np.asarray(noise.random_bits(*map(jnp.uint32, base)))
  for which in range(4):
    for bit in range(32):
      changed = list(base)
      changed[which] = changed[which] ^ np.uint32(1 << bit)
      after = np.asarray(noise.random_bits(*map(jnp.uint32, changed)))
      share = np.bitwise_count(before ^ after).mean() / 32
      assert abs(share - 0.5) < 0.02, (which, bit)


def test_what_is_no_key_is_refused():
  for key in (0, jnp.zeros((2,), jnp.uint32), jax.random.split(jax.random.key(0))):
    with pytest.raises(ValueError, match=r"op: key must be one jax\.random\.key"):
      noise.words_of("op", key)
