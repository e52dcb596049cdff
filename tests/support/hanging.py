"""Trains on data that do not answer; see tests/faults/numerics_test.py.

hanging.py FLAGS...
"""

import threading

from absl import app, flags

from marlin_jax import train
from marlin_jax.data import prepared_dataset
from marlin_jax.evaluators import probe  # noqa: F401, so that it takes no time
from marlin_jax.training import config_flags


def read_from_a_disk_that_does_not_answer(*_):
  threading.Event().wait()


if __name__ == "__main__":
  prepared_dataset.open_dataset = read_from_a_disk_that_does_not_answer
  flags.mark_flag_as_required("config")
  app.run(train.main, flags_parser=config_flags.parse)
