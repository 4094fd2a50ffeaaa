"""Embedding tables on a mesh, whose cost follows the looked-up rows."""

from gemjax.embedding.lookup import Rows, assemble, candidate_units
from gemjax.embedding.sharded import Plans, ShardedTables, Stacks
from gemjax.embedding.tables import TableLayout, layout_tables

__all__ = [
  "Plans",
  "Rows",
  "ShardedTables",
  "Stacks",
  "TableLayout",
  "assemble",
  "candidate_units",
  "layout_tables",
]
