"""Saves checkpoints, and dies in the middle of one; d_checkpoints_test.py.

  dying.py DIRECTORY AT

Saves steps 1 and 2 of a small state and is killed when it touches a file for
the AT-th time while it saves step 2: how far it has come does not depend on
luck. With AT=0 it lives and prints how many times that was.
"""

import os
import signal
import sys

import numpy as np

from marlin_jax import checkpoint


def state_of(step):
  return {"a": np.arange(1000.0) * step, "b": np.full((30, 30), step)}


def main(directory, at):
  touched = 0

  def watch(event, args):
    nonlocal touched
    if event in ("open", "os.mkdir", "os.rename", "os.remove") and (
      str(directory) in str(args[0])
    ):
      touched += 1
      if touched == at:
        os.kill(os.getpid(), signal.SIGKILL)

  checkpoints = checkpoint.Checkpoints(directory, keep=3)
  checkpoints.save(1, state_of(1), {"run": 1})
  checkpoints.wait()
  sys.addaudithook(watch)
  checkpoints.save(2, state_of(2), {"run": 1})
  checkpoints.close()
  print(touched)


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]))
