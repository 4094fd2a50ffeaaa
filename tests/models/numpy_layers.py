"""What models of histories are made of, in float64 numpy, for one example, from the formulas.

x is (N, D), the units of an example; s is (n, D), its tokens of one history, oldest first, and age
(n,) their seconds; w are the parameters of a layer as nested dicts. Attention and blocks lie beside
the tests of layers.
"""

import numpy as np
from sequence_oracle import cross_attention, layer_norm, linear, mlp

ACTIVATIONS = {"sigmoid": lambda x: 1 / (1 + np.exp(-x)), "tanh": np.tanh, "identity": lambda x: x}


def over_units(x, w):
  y = w["kernel_NL"].T @ x
  return y + w["bias_L"][:, None] if w.get("bias_L") is not None else y


def gating(x, w, kind):
  return x if kind == "none" else ACTIVATIONS[kind](x * mlp(x, w["mlp"]))


def unit_summary(x, w, kind, *, cls, mlp):
  """(cls, D)."""
  if mlp:
    x = np.maximum(over_units(x, w["hidden"]), 0)
  y = over_units(x, w["compress"])
  assert len(y) == cls
  return gating(y, w.get("gate"), kind)


def age_bucket(age):
  """floor(2 log2(1 + age)) in whole numbers."""
  return ((1 + int(age)) ** 2).bit_length() - 1


def event_tokens(units, age, w):
  """(n, F, D) -> (n, D)."""
  s = units.reshape(len(units), units.shape[1] * units.shape[2])
  fused = linear(s * mlp(s, w["mask_net"]["mask"]), w["mask_net"]["lce"])
  if w.get("age_AD") is not None:
    fused = fused + w["age_AD"][[age_bucket(a) for a in age]]
  return layer_norm(fused, w["norm"])


def candidate_token(x, places, w):
  """(1, D): an event of age 0 of the units that the example has of it."""
  units = np.stack([x[place] if place >= 0 else 0 * x[0] for place in places])
  return event_tokens(units[None], [0], w)


def wukong_layer(x, w, fmb_units):
  pairs = x @ (x.T @ w["fm"]["y_NK"] if "fm" in w else x.T)
  fmb = mlp(layer_norm(pairs.reshape(-1), w["fm_norm"]), w["mlp"]).reshape(fmb_units, -1)
  residual = over_units(x, w["residual"]) if w.get("residual") else x
  return layer_norm(np.concatenate([fmb, over_units(x, w["compress"])]) + residual, w["norm"])


def personalised(s, x_sum, w):
  dim = s.shape[1]
  return s @ np.einsum("k,kij->ij", x_sum.reshape(-1), w["kernel"].reshape(-1, dim, dim))


def sequence_summary(s, age, w, attention, *, first=0, queries=None, pma=0, recent=0):
  """Leading tokens, the caller's queries and learnt ones over all tokens, the newest events."""
  parts = [s[:first]]
  asked = [] if queries is None else [queries]
  if pma:
    assert len(w["pool"]["seeds_MD"]) == pma
    asked.append(w["pool"]["seeds_MD"])
  if asked:
    parts.append(cross_attention(np.concatenate(asked), s, age, w["pool"]["attention"], attention))
  if recent:
    newest = s[first:][-recent:]
    parts += [np.zeros((recent - len(newest), s.shape[1])), newest]
  return np.concatenate(parts)


def coarsen(s, age, stride):
  """Means of groups that are counted from the newest back."""
  groups = []
  for end in range(len(s), 0, -stride):
    start = max(0, end - stride)
    groups.insert(0, (s[start:end].mean(0), age[end - 1]))
  return np.array([g for g, _ in groups]).reshape(-1, s.shape[1]), [a for _, a in groups]


def remembered(queries, memories, w):
  """softmax(W_q Q (W_k M)ᵀ / sqrt(d)) W_v M over the units of all memories."""
  units = np.concatenate(memories)
  k, v = np.split(units @ w["keys_values"]["kernel"], 2, axis=1)
  scores = np.exp(queries @ w["query"]["kernel"] @ k.T / np.sqrt(units.shape[1]))
  return scores / scores.sum(1, keepdims=True) @ v


def heads(x, w):
  return np.array([mlp(x.reshape(-1), w["heads"][t])[0] for t in range(len(w["heads"]))])


def interest(s, candidate, w, *, mean=False):
  """v = sum_e MLP([e, c, e - c, e * c]) e, not normalised; with `mean` over the events' number."""
  seen = lambda e: np.concatenate([e, candidate, e - candidate, e * candidate])
  total = sum((mlp(seen(e), w["weigh"]) * e for e in s), np.zeros_like(candidate))
  return total / max(1, len(s)) if mean else total
