"""Command-line conventions: argument types, messages, exit codes."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from marlin_jax.records import cgroups, signals

# What stands before the name of a command that `marlin_jax.__main__` runs, such
# as 'marlin-' before 'train'. None: `python -m MODULE` runs it.
prefix: str | None = None
_COMMAND = re.compile(
  r"python -m (?:marlin_jax|data_prep|marlin_jax\.data_prep)\."
  r"(?P<name>(?:eval\.)?[a-z_]+)(?![.\w])"
)
# Exit code after Ctrl-C or SIGTERM.
INTERRUPTED = 130
_RESUMABLE = "Finished work is kept; run the same command to resume."


def as_started(text: str | None) -> str | None:
  """Returns a text with each command named as the user has named this one.

  Args:
    text: names commands as `python -m MODULE`; None is returned as it is.
  """
  if text is None or prefix is None:
    return text
  return _COMMAND.sub(
    lambda found: prefix + re.sub("[._]", "-", found["name"]), text
  )


class UserError(Exception):
  """Error that the user can mend; its message says how.

  Commands print the message without a traceback and exit with `exit_code`.
  """

  exit_code = 1

  def __str__(self) -> str:
    return as_started(super().__str__())


class ArgumentError(UserError):
  """Arguments that contradict each other."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
  """Help formatter that shows the default of each argument that has one.

  The line breaks of a description or epilog of several lines are kept.
  """

  def _fill_text(self, text: str, width: int, indent: str) -> str:
    if "\n" in text:
      return text
    return super()._fill_text(text, width, indent)

  def _get_help_string(self, action: argparse.Action) -> str | None:
    if action.default is False or action.default in (None, "", []):
      return action.help
    return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
  """Parser of a command's arguments; its help shows their defaults.

  Args:
    module: the command, which `python -m MODULE` runs.
    description: text before the arguments.
    epilog: text after them.
  """

  def __init__(self, module: str, description: str, epilog: str | None = None):
    super().__init__(
      prog=as_started(f"python -m {module}"),
      description=as_started(description),
      epilog=as_started(epilog),
      formatter_class=_HelpFormatter,
      allow_abbrev=False,  # a misspelled flag is an error
    )


def run_command(work: Callable[[], None], interrupted: str = _RESUMABLE) -> int:
  """Runs the work of a command and turns errors into an exit code.

  Args:
    work: function that does the work.
    interrupted: message after Ctrl-C or SIGTERM; says what is kept.

  Returns:
    0; the `exit_code` of a `UserError`; 1 after an `OSError`, such as a full
    disk; 130 when interrupted.
  """
  interrupt = KeyboardInterrupt()
  try:
    with signals.raised_as(interrupt, signal.SIGINT, signal.SIGTERM):
      work()
  except KeyboardInterrupt:
    print(f"\nInterrupted. {interrupted}", file=sys.stderr)
    return INTERRUPTED
  except UserError as e:
    print(f"error: {e}", file=sys.stderr)
    return e.exit_code
  except OSError as e:
    print(f"error: {os_error_text(e)}", file=sys.stderr)
    return 1
  return 0


def os_error_text(error: OSError) -> str:
  """Returns the path and the reason of an error, without its number."""
  if error.filename is None or not error.strerror:
    return str(error)
  reason = error.strerror
  if isinstance(error, (FileExistsError, NotADirectoryError)):
    reason = "a file is where a folder is expected"
  return f"{error.filename}: {reason}"


@dataclasses.dataclass(frozen=True)
class Row:
  """Line of a start-up text.

  Attributes:
    label: text of at most 8 characters.
    value: text beside the label.
    notes: further lines below the value.
  """

  label: str
  value: str
  notes: list[str] = dataclasses.field(default_factory=list)


def format_rows(rows: Iterable[Row]) -> str:
  """Returns a start-up text: a column of labels, a column of values."""
  return "\n".join(
    f"{label:<9}{text}"
    for row in rows
    for label, text in zip(
      [row.label] + [""] * len(row.notes), [row.value, *row.notes], strict=True
    )
  )


def without_gc(function: Callable) -> Callable:
  """Decorator: pauses the garbage collector while the function runs.

  For functions that create a million objects and keep them all: a third of
  their time would go into repeated searches for cycles.
  """

  @functools.wraps(function)
  def paused(*args, **kwargs):
    was_on = gc.isenabled()
    gc.disable()
    try:
      return function(*args, **kwargs)
    finally:
      if was_on:
        gc.enable()

  return paused


def at_least(least: int, most: float = math.inf) -> Callable[[str], int]:
  """Returns an argument type: integers of `least` or more, up to `most`."""

  def parse(text: str) -> int:
    value = int(text)
    if value < least:
      raise argparse.ArgumentTypeError(f"{value} is less than {least}")
    if value > most:
      raise argparse.ArgumentTypeError(f"{value} is more than {most}")
    return value

  parse.__name__ = "int"  # shown in argparse's error message
  return parse


def output_file(*suffixes: str) -> Callable[[str], Path]:
  """Returns an argument type: path of a file to write, refused before the work.

  Args:
    *suffixes: what the path may end with, in lower case; none: anything.
  """

  def parse(text: str) -> Path:
    if "://" in text:  # which would become a local folder, gs:
      raise argparse.ArgumentTypeError(
        f"{text} is in a bucket, expected a path on a disk"
      )
    path = Path(text)
    if suffixes and path.suffix.lower() not in suffixes:
      raise argparse.ArgumentTypeError(
        f"{text} does not end with {' or '.join(suffixes)}"
      )
    # Not Path.is_dir, which raises where it may not look.
    if os.path.isdir(path):
      raise argparse.ArgumentTypeError(f"{text} is a folder, expected a file")
    for parent in path.parents:
      if os.path.exists(parent) and not os.path.isdir(parent):
        raise argparse.ArgumentTypeError(
          f"{parent} is a file, expected a folder"
        )
    return path

  return parse


class Task(NamedTuple):
  """A part of a command's work, for one of several machines.

  Attributes:
    index: number of the task, from 0.
    count: number of tasks; 1: the task is the whole work.
  """

  index: int = 0
  count: int = 1

  @property
  def suffix(self) -> str:
    """Ends the names of files that each task has for itself; '' for one."""
    if self.count == 1:
      return ""
    return f"-{self.index:05d}-of-{self.count:05d}"

  def part(self, items: Sequence) -> Sequence:
    """Returns the task's items."""
    return items[self.index :: self.count]


# The whole work as one task.
WHOLE = Task()


def add_task_arguments(parser: argparse.ArgumentParser, effect: str) -> None:
  """Adds --task_index and --task_count; `task_of` reads them.

  Args:
    parser: parser of the command.
    effect: what the run without these flags does after all tasks.
  """
  group = parser.add_argument_group(
    "many machines",
    "Each task takes its own part of the videos. All machines must see the "
    "input and --output at the same paths. Processes that srun, mpirun or "
    "JAX_COORDINATOR_ADDRESS start together are tasks without these flags.",
  )
  group.add_argument(
    "--task_index",
    type=at_least(0),
    help="index of this task, from 0",
  )
  group.add_argument(
    "--task_count",
    type=at_least(1),
    help="number of tasks; after all tasks, run the same command without these "
    f"two flags {effect}",
  )


def task_of(args: argparse.Namespace) -> Task | None:
  """Returns the task that the arguments name; None if they name none.

  Raises:
    ArgumentError: only one of them is given, or they contradict each other.
  """
  index, count = args.task_index, args.task_count
  if index is None and count is None:
    return None
  if index is None or count is None or index >= count:
    raise ArgumentError(
      f"--task_index is {index} and --task_count {count}: expected both, and "
      "an index below the count"
    )
  return Task(index, count)


def num_cores() -> int:
  """Returns the number of cores that this process may use, at least 1."""
  if sys.platform == "linux":
    cores = len(os.sched_getaffinity(0))
  else:
    cores = os.cpu_count() or 1
  limit = cgroups.core_limit()
  return cores if limit is None else min(cores, limit)


def process_ending(code: int | None) -> str:
  """Returns how a worker process ended, such as 'was killed by SIGTERM'.

  Args:
    code: its exit code, negative for a signal; None: it has not ended.
  """
  if code is None:
    return "closed its pipe"
  if code >= 0:
    return f"ended with exit code {code}"
  name = signal.Signals(-code).name
  more = " (out of memory?)" if -code == signal.SIGKILL else ""
  return f"was killed by {name}{more}"


def counted(number: int, noun: str) -> str:
  """Returns a number with its noun: '1 video', '2 batches', '2 people'."""
  if number != 1:
    plural = f"{noun}{'es' if noun.endswith('ch') else 's'}"
    noun = "people" if noun == "person" else plural
  return f"{number} {noun}"


def reasons(reason_of: dict[str, str]) -> list[str]:
  """Returns a line for each of the five most common reasons, with an example.

  Args:
    reason_of: reason by name of the item.
  """
  by_reason: dict[str, list[str]] = {}
  for name, reason in reason_of.items():
    by_reason.setdefault(reason, []).append(name)
  most_common = sorted(by_reason.items(), key=lambda item: -len(item[1]))
  lines = [
    f"  {len(names)} x {reason} (e.g. {min(names)!r})"
    for reason, names in most_common[:5]
  ]
  if len(most_common) > 5:
    lines.append(f"  and {len(most_common) - 5} more reasons")
  return lines
