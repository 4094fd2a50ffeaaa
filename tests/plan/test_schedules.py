"""Of the schedules that are tried the shortest is kept."""

import re

from test_estimate import of_program

from gemjax.plan.training import QUEUED, best_scheduled

COST = re.compile(r'name: "start" cost_us: ([\d.]+)')


class Program:
  """Made by a profile, as XLA makes one: it takes longer, the further its exchange was said to take
  from three times its cost.
  """

  def __init__(self, said=0.0):
    self.said = said

  def scheduled_by(self, file):
    return Program(float(COST.search(file.read_text()).group(1)))


def test_the_shortest_step_is_kept_and_its_costs_are_written(tmp_path):
  first = of_program()
  exchange = 1e6 * first.transfers[0].seconds
  estimated = lambda program: first._replace(seconds=abs(program.said - 3 * exchange))
  file = tmp_path / "step.pbtxt"
  best = best_scheduled(Program(), estimated, file)
  assert 3 in QUEUED and best.said == round(3 * exchange, 4)
  assert file.read_text() == first.profile(3)
