"""Embedding tables whose cost follows the looked-up rows."""

from gemjax.embedding.lookup import assemble, mean_pool, stack_ids
from gemjax.embedding.stack import Stack, StackRule
from gemjax.embedding.tables import TableLayout, layout_tables

__all__ = [
  "Stack",
  "StackRule",
  "TableLayout",
  "assemble",
  "layout_tables",
  "mean_pool",
  "stack_ids",
]
