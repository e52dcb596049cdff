"""Saves checkpoints and dies while saving; see faults/checkpoints_test.py.

  dying.py DIRECTORY EVENT NAME

Saves step 1 of a small state, and is killed while it saves step 2: just before
EVENT (open, os.mkdir, os.rename) on a file whose name begins with NAME. Every
run is therefore killed at the same point.
"""

import os
import signal
import sys

import numpy as np

from marlin_jax.checkpoints.manager import Checkpoints


def state_of(step):
  return {"a": np.arange(1000.0) * step, "b": np.full((30, 30), step)}


def main(directory, event, name):
  def kill_at(event_name, args):
    if event_name == event and os.path.basename(str(args[0])).startswith(name):
      os.kill(os.getpid(), signal.SIGKILL)

  checkpoints = Checkpoints(directory, keep=3)
  checkpoints.save(1, state_of(1), {"run": 1})
  checkpoints.wait()
  sys.addaudithook(kill_at)
  checkpoints.save(2, state_of(2), {"run": 1})
  checkpoints.close()


if __name__ == "__main__":
  main(*sys.argv[1:])
