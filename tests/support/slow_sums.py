"""Trains as one of two processes with slow checksums; see distributed_test.py.

  slow_sums.py FLAGS...

The checksums of step 6, the last one, take longer than jax's shutdown waits for
the other processes.
"""

import time

from absl import app, flags

from marlin_jax import train
from marlin_jax.checkpoints import checksums
from marlin_jax.devices import distributed
from marlin_jax.training import config_flags

SHUTDOWN_SECS = 3
SLOW_SECS = 10


def main():
  distributed._SHUTDOWN_SECS = SHUTDOWN_SECS
  write = checksums._write

  def slow_write(directory, *args):
    if directory.name == "6":
      time.sleep(SLOW_SECS)
    write(directory, *args)

  checksums._write = slow_write
  flags.mark_flag_as_required("config")
  app.run(train.main, flags_parser=config_flags.parse)


if __name__ == "__main__":
  main()
