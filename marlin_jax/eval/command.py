"""Command line of the evaluation commands far, fer and dfd."""

from __future__ import annotations

from collections.abc import Sequence

from absl import app, flags, logging

from marlin_jax.eval import configuration
from marlin_jax.records import cli
from marlin_jax.training import config_flags
from marlin_jax.training.configuration import flat

flags.adopt_module_key_flags(config_flags)
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint",
  None,
  "The encoder: the workdir of a run, a file or folder in any format of "
  "marlin_jax.convert (such as MARLIN's and VideoMAE's), the name of a "
  "published model, or 'random' for an untrained encoder with the sizes of "
  "config.random. Without one, --config.features names features from "
  "elsewhere.",
)
_DATA = flags.DEFINE_string(
  "data",
  None,
  "A data set written by data_prep.prepare, with labels; for lip "
  "synchronisation with sound.",
)


def main(argv: Sequence[str]) -> int:
  """Evaluates --checkpoint on --data; several processes do it together.

  Returns:
    The exit code, see `cli.run_command`. If one process fails, all end with its
    code.
  """
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  logging.set_verbosity(logging.FATAL)  # orbax logs every save
  config = config_flags.config(configuration.validate)
  # Imported here, since it takes seconds: --help and flag errors are immediate.
  from marlin_jax.devices import coordination, distributed
  from marlin_jax.eval.evaluation import evaluate

  workdir = config_flags.workdir()

  def work() -> None:
    distributed.initialise(config.distributed)
    with distributed.ending_together():
      distributed.check_same(distributed.shared_values(flat(config)))
      evaluate(config, _CHECKPOINT.value or "", _DATA.value, workdir)
      # A process that leaves waits in jax's shutdown, for a limited time.
      coordination.wait_for_all()

  return cli.run_command(work)


def run() -> None:
  """Parses the flags and runs `main`."""
  config_flags.run(main, "data")
