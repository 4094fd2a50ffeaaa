"""Checkpoints of other libraries read as runs of this one, and runs written as theirs."""

from gemjax.convert.conversion import FORMATS, convert
from gemjax.convert.tensors import ConvertError

__all__ = ["FORMATS", "ConvertError", "convert"]
