"""Sequence layers in float64 numpy, one example after the other, from the papers' equations.

x is (n, D), the events of one example; w are the parameters of a layer as nested dicts.
"""

import numpy as np


def layer_norm(x, w):
  centred = x - x.mean(-1, keepdims=True)
  return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * w["scale"] + w["bias"]


def linear(x, w):
  return x @ w["kernel"] + w.get("bias", 0)


def mlp(x, w):
  for i in range(len(w["layers"]) - 1):
    x = np.maximum(linear(x, w["layers"][i]), 0)
  return linear(x, w["layers"][len(w["layers"]) - 1])


def silu(x):
  return x / (1 + np.exp(-x))


def bucket(distance, count, octaves):
  """2^bits buckets an octave, bits the largest whose buckets fit."""
  bits = 0
  while 1 + octaves * 2 ** (bits + 1) <= count:
    bits += 1
  d = float(np.float32(abs(distance)))
  if d == 0:
    return 0
  octave = int(np.floor(np.log2(d)))
  return min(count - 1, 1 + octave * 2**bits + int((d / 2**octave - 1) * 2**bits))


def _table(w, head, distance, octaves, signed):
  row = w["table_HN"][head]
  if not signed:
    return row[bucket(distance, len(row), octaves)]
  side = len(row) // 2
  return row[bucket(distance, side, octaves) + (side if distance < 0 else 0)]


def _turned(x, place, base):
  half = len(x) // 2
  turn = np.exp(1j * place * base ** (-np.arange(half) / half))
  turned = (x[:half] + 1j * x[half:]) * turn
  return np.concatenate([turned.real, turned.imag])


def _rms(x, gain):
  return x / np.sqrt((x**2).mean() + 1e-6) * gain


def _sees(t, e, config, causal):
  seen = e <= t or not causal
  if config.window:
    seen = seen and abs(t - e) < config.window
  if config.block:
    seen = seen and t // config.block == e // config.block
  return seen


def self_product(q, k, v, age, w, config, *, causal, norm=None):
  """The attended values of one example's events; softmax where `norm` is None, else SiLU / norm."""
  out, width = np.zeros_like(v), q.shape[1] // config.heads
  for h in range(config.heads):
    part = slice(h * width, (h + 1) * width)
    for t in range(len(q)):
      seen = [e for e in range(len(q)) if _sees(t, e, config, causal)]
      scores = []
      for e in seen:
        q_t, k_e = q[t, part], k[e, part]
        if config.qk_norm:
          q_t, k_e = _rms(q_t, w["gains"][0]), _rms(k_e, w["gains"][1])
        if config.rope:
          q_t, k_e = _turned(q_t, t, config.rope), _turned(k_e, e, config.rope)
        score = q_t @ k_e / (np.sqrt(width) if norm is None else 1)
        if config.position_buckets:
          score += _table(w["position"], h, t - e, 12, not causal)
        if config.time_buckets:
          score += _table(w["time"], h, age[e] - age[t], 31, not causal)
        scores.append(score)
      weights = _softmax(scores) if norm is None else silu(np.array(scores)) / norm
      out[t, part] = weights @ v[seen, part]
  return out


def _softmax(scores):
  weights = np.exp(np.array(scores) - max(scores))
  return weights / weights.sum()


def self_attention(x, age, w, config, causal):
  q, k, v = np.split(linear(x, w["qkv"]), 3, axis=1)
  return linear(self_product(q, k, v, age, w.get("product"), config, causal=causal), w["out"])


def cross_attention(queries, x, age, w, config):
  """M queries over the events x; zeros where there are none."""
  q, (k, v) = linear(queries, w["query"]), np.split(linear(x, w["kv"]), 2, axis=1)
  out, width = np.zeros_like(q), q.shape[1] // config.heads
  for h in range(config.heads):
    part = slice(h * width, (h + 1) * width)
    for m in range(len(q) if len(x) else 0):
      scores = []
      for e in range(len(x)):
        q_m, k_e = q[m, part], k[e, part]
        if config.qk_norm:
          q_m, k_e = (_rms(y, gain) for y, gain in zip((q_m, k_e), w["product"]["gains"].values()))
        score = q_m @ k_e / np.sqrt(width)
        if config.position_buckets:
          score += _table(w["product"]["position"], h, len(x) - 1 - e, 12, False)
        if config.time_buckets:
          score += _table(w["product"]["time"], h, age[e], 31, False)
        scores.append(score)
      out[m, part] = _softmax(scores) @ v[:, part]
  return linear(out, w["out"])


def hstu(x, age, w, config, norm):
  u, v, q, k = np.split(silu(linear(layer_norm(x, w["norm_in"]), w["uvqk"])), 4, axis=1)
  av = self_product(q, k, v, age, w.get("product"), config, causal=True, norm=norm)
  return linear(u * layer_norm(av, w["norm_out"]), w["out"]) + x


def transformer(x, age, w, config, causal):
  normed = layer_norm(x, w["norm_attention"])
  x = x + self_attention(normed, age, w["attention"], config, causal)
  return x + mlp(layer_norm(x, w["norm_mlp"]), w["mlp"])
