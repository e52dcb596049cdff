"""Reports a few steps to a watchdog and then hangs.

Started by tests/faults/numerics_test.py.
"""

import threading

from marlin_jax.training.watchdog import Watchdog


def read_from_a_disk_that_does_not_answer():
  threading.Event().wait()


if __name__ == "__main__":
  with Watchdog(dump_secs=0.2, exit_secs=0.4) as watchdog:
    for step in range(1, 4):
      watchdog.alive(f"step {step}")
    read_from_a_disk_that_does_not_answer()
