"""Which implementation of an op runs: the one rule for all ops.

    None       a GPU kernel where the program runs on an NVIDIA GPU, XLA elsewhere
    "xla"      plain JAX whose work follows the events
    "triton"   the Pallas kernel in the Triton lowering (sm_80 and later)
    "mosaic"   the Pallas kernel in the Mosaic GPU lowering (sm_90a), where an op has one
    "reference" the formula in plain JAX, without regard to cost

A kernel that is asked for by name runs in Pallas' interpreter where there is no GPU: slow, and the
way in which its numbers are tested.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax

Implementation = Callable[..., Any]
INTERPRETED = ("triton", "mosaic")  # These take `interpret`.
_NAMES = ("xla", "triton", "reference")


class Refused(ValueError):
  """An implementation cannot do what was asked of it."""


def check(op: str, name: str | None) -> None:
  """Raises Refused for a name that no op without a Mosaic kernel has."""
  if name not in (None, *_NAMES):
    raise Refused(f"{op}: implementation {name!r} is not one of {', '.join(_NAMES)}")


def dispatch(
  op: str,
  name: str | None,
  implementations: dict[str, Implementation],
  *args: Any,
  refusal: str | None = None,
  kernel: str | None = "triton",
) -> Any:
  """implementations[the chosen one](*args).

  Args:
    op: The op's name, for messages.
    name: The implementation that the caller asked for; None leaves it to the rule.
    implementations: By name. Those of `INTERPRETED` take the keyword `interpret`; all give
      results of the same shapes and dtypes.
    *args: Pytrees of arrays; everything static is bound into the implementations before.
    refusal: Why the kernel cannot do it, in one sentence with the values; None where it can.
    kernel: The one that the rule takes; None where XLA is faster.

  Raises:
    Refused: An unknown name, or a kernel asked for by name that refuses.
  """
  if name is None:
    on_gpu = implementations.get(kernel)
    if on_gpu is None or refusal:
      if refusal and jax.default_backend() == "gpu":
        _say_once(f"{op} runs as plain XLA on the GPU: {refusal}")
      return implementations["xla"](*args)
    return jax.lax.platform_dependent(
      *args, cuda=functools.partial(on_gpu, interpret=False), default=implementations["xla"]
    )
  if name not in implementations:
    raise Refused(f"{op}: implementation {name!r} is not one of {', '.join(implementations)}")
  chosen = implementations[name]
  if name not in INTERPRETED:
    return chosen(*args)
  if refusal:
    raise Refused(f"{op}: implementation {name!r} was asked for, but {refusal}")
  if name == "mosaic":  # Its interpreter has side effects, which no branch may have on a GPU.
    return chosen(*args, interpret=jax.default_backend() != "gpu")
  return jax.lax.platform_dependent(
    *args,
    cuda=functools.partial(chosen, interpret=False),
    default=functools.partial(chosen, interpret=True),
  )


@functools.cache
def _say_once(sentence: str) -> None:
  logging.getLogger(__name__).warning(sentence)
