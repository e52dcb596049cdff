"""The command line of the evaluations: flags, errors, exit codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from absl import app, flags, logging

from marlin_jax.eval import configuration
from marlin_jax.records import cli
from marlin_jax.training import config_flags

flags.adopt_module_key_flags(config_flags)
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint",
  None,
  "The encoder: the workdir of a run, whatever marlin_jax.convert reads or "
  "writes (MARLIN's and VideoMAE's files), the name of a published model, or "
  "'random' for one that has learned nothing (its sizes: config.random).",
)
_DATA = flags.DEFINE_string(
  "data",
  None,
  "A data set written by data_prep.prepare: with labels; for lip "
  "synchronisation with sound.",
)


def main(argv: Sequence[str]) -> int:
  """What each of the binaries does with --config, --checkpoint and --data.

  Returns:
    The exit code, see `cli.run_command`.
  """
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  logging.set_verbosity(logging.FATAL)  # orbax tells of every save
  config = config_flags.config(configuration.validate)
  # Imported here: they take seconds, which --help and bad flags need not wait.
  from marlin_jax.eval.evaluation import evaluate

  workdir = config_flags.workdir()
  return cli.run_command(
    lambda: evaluate(config, _CHECKPOINT.value, _DATA.value, workdir)
  )


def run(main: Callable[[Sequence[str]], int | None]) -> None:
  """Starts a binary."""
  for name in ("config", "checkpoint", "data"):
    flags.mark_flag_as_required(name)
  app.run(main, flags_parser=config_flags.parse)
