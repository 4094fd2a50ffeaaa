"""The one summary at the end of a run: for people, and `summary.json` for tools."""

from __future__ import annotations

import pathlib
from typing import Any

from gemjax.train.workdir import SUMMARY, write_json

METRICS = ("auc", "gauc", "log_loss", "ne", "calibration")
SPLITS = ("valid", "test")


def split_summary(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
  """The first task's metrics, and where there are more tasks all of them under "tasks"."""
  first = next(iter(results.values()))
  return dict(first) | ({"tasks": results} if len(results) > 1 else {})


def publish(summary: dict[str, Any], path: pathlib.Path) -> None:
  """Writes it into the folder of the run, and prints it."""
  write_json(path / SUMMARY, summary)
  print("\n" + render(summary), flush=True)


def render(summary: dict[str, Any]) -> str:
  """The summary as a table of at most 100 columns."""
  train, params = summary["train"], summary["params"]
  lines = [
    f"{summary['name']}: {train['steps']:,} steps in {train['seconds']:,.0f} s, "
    f"{train['examples_per_second']:,.0f} examples/s on {summary['device']}, "
    f"training loss {_number(train['loss'])}",
    f"parameters: {params['dense']:,} dense, {params['embedding']:,} embedding; "
    f"{summary['gflop_per_example']:.3g} GFLOP an example; seed {summary['seed']}",
    "start-up: " + ", ".join(f"{n} {s:.1f} s" for n, s in summary["start_up_seconds"].items()),
    "",
    *table({split: summary[split].get("tasks", {"": summary[split]}) for split in SPLITS}),
  ]
  return "\n".join(lines)


def table(splits: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
  """Lines of split -> task -> metrics."""
  lines = [f"{'':<20}" + "".join(f"{m:>12}" for m in METRICS)]
  for split, tasks in splits.items():
    for task, metrics in tasks.items():
      lines.append(
        f"{split + ' ' + task:<20}" + "".join(f"{_number(metrics[m]):>12}" for m in METRICS)
      )
      if (bayes := metrics.get("bayes_ne")) is not None and metrics["ne"] is not None:
        closed = (1 - metrics["ne"]) / (1 - bayes)
        lines.append(
          f"{'':<20}Bayes-optimal NE {bayes:.5f}: {closed:.1%} of the gap from the base rate closed"
        )
  return lines


def _number(value: float | None) -> str:
  return "-" if value is None else f"{value:.5f}"
