"""The tiny config in a process that prints the name of every program that it compiles."""

import tiny


def get_config(model: str = "wukong"):
  from gemjax.train.executables import Executables

  compile_ = Executables.compile

  def watched(self, program, *args):
    print(f"compiles {program}", flush=True)
    return compile_(self, program, *args)

  Executables.compile = watched
  return tiny.get_config(model)
