"""Metrics of a run: metrics.jsonl, TensorBoard and the progress line."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from marlin_jax.records import folders


class MetricWriter:
  """Writes scalars and pictures of a run, in process 0.

  metrics.jsonl is the record of a run; TensorBoard's event files repeat it.
  """

  def __init__(self, workdir: str | Path, *, start_step: int):
    """Opens the files and removes lines of steps after `start_step`."""
    self._writes = jax.process_index() == 0
    if not self._writes:
      return
    self._path = Path(workdir) / "metrics.jsonl"
    lines = []
    if self._path.exists():
      lines = self._path.read_text().splitlines()
    text = "".join(f"{x}\n" for x in lines if _step_of(x) <= start_step)
    folders.write_bytes(self._path, text.encode())
    self._file = self._path.open("a", buffering=1)
    self._board = _summary_writer()(
      str(Path(workdir) / "tensorboard"), purge_step=start_step + 1
    )

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """Adds an object to metrics.jsonl, and the scalars to TensorBoard.

    Values that are not finite are left out: JSON cannot express them.
    """
    if not self._writes:
      return
    scalars = {k: v for k, v in scalars.items() if math.isfinite(v)}
    self._file.write(json.dumps({"step": step, **scalars}) + "\n")
    for name, value in scalars.items():
      self._board.add_scalar(name, value, step)

  def event(self, name: str, step: int, **details: Any) -> None:
    """Adds an object with the key `event` to metrics.jsonl alone."""
    if self._writes:
      line = {"step": step, "event": name, **details}
      self._file.write(json.dumps(line) + "\n")

  def write_picture(self, step: int, name: str, picture: np.ndarray) -> None:
    """Adds a picture, uint8 (H, W, 3), to TensorBoard."""
    if self._writes:
      self._board.add_image(name, picture, step, dataformats="HWC")

  def close(self) -> None:
    """Closes the files."""
    if self._writes:
      self._file.close()
      self._board.close()


def _summary_writer() -> type:
  """Imports tensorboardX.SummaryWriter without PyTorch.

  tensorboardX/writer.py imports PyTorch if it is installed, only for a type
  annotation, which takes 3 seconds at each start. The import fails, as if
  PyTorch was not installed, while sys.modules holds None in its place; see "The
  module cache" in the reference of Python's import system.
  """
  is_hidden = "torch" not in sys.modules
  if is_hidden:
    sys.modules["torch"] = None
  try:
    from tensorboardX import SummaryWriter
  finally:
    if is_hidden:
      del sys.modules["torch"]
  return SummaryWriter


def _step_of(line: str) -> float:
  """Returns the step of a line of metrics.jsonl."""
  try:
    return json.loads(line)["step"]
  except (ValueError, KeyError):
    return float("inf")  # the half-written last line of a killed run


class Progress:
  """Progress of a run, printed by process 0.

  A bar with the remaining time on a terminal; in a log file a line per report.
  """

  def __init__(self, total: int, *, start: int):
    """Shows `start` of `total` steps."""
    self._total = total
    self._prints = jax.process_index() == 0
    self._bar = tqdm(
      total=total,
      initial=start,
      unit="step",
      dynamic_ncols=True,
      # Shows every step: on small machines they are slow.
      mininterval=0.5,
      disable=not (self._prints and sys.stderr.isatty()),
      bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
      "[{elapsed}<{remaining}{postfix}]",
    )

  def step(self) -> None:
    """Advances by a step."""
    self._bar.update()

  def report(self, step: int, scalars: dict[str, float]) -> None:
    """Shows the losses and rates among a step's metrics."""
    losses = [
      f"{name.removeprefix('train/')} {value:.4f}"
      for name, value in scalars.items()
      if name.startswith("train/loss_")
    ]
    rates = [f"{scalars['time/clips_per_sec']:.1f} clips/s"]
    if "time/mfu" in scalars:
      rates.append(f"MFU {scalars['time/mfu']:.1%}")
    rates.append(f"data wait {scalars['time/data_wait_ratio']:.1%}")
    text = ", ".join(losses + rates)
    if not self._bar.disable:
      # A terminal cuts off the end of a long line.
      self._bar.set_postfix_str(text.replace("loss_", ""))
      return
    remaining = (self._total - step) * scalars["time/step_secs"]
    self.say(
      f"step {step}/{self._total}: {text}, "
      f"ETA {tqdm.format_interval(remaining)}"
    )

  def say(self, line: str) -> None:
    """Prints a line, above the bar if there is one."""
    if self._prints:
      tqdm.write(line, file=sys.stdout)
      sys.stdout.flush()

  def close(self) -> None:
    """Removes the bar."""
    self._bar.close()
