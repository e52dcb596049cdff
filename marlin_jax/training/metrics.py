"""What a run tells: metrics.jsonl, TensorBoard, progress."""

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
  """Writes scalars and pictures of one run.

  metrics.jsonl has one object per logged step and is the source of truth;
  TensorBoard shows the same beside it. Of several processes only the first
  writes.
  """

  def __init__(self, workdir: str | Path, *, start_step: int):
    """Opens the files; what an interrupted run wrote past start_step goes."""
    self._writes = jax.process_index() == 0
    if not self._writes:
      return
    self._path = Path(workdir) / "metrics.jsonl"
    kept = []
    if self._path.exists():
      lines = self._path.read_text().splitlines()
      kept = [line for line in lines if _step_of(line) <= start_step]
    text = "".join(f"{line}\n" for line in kept)
    folders.write_bytes(self._path, text.encode())
    self._file = self._path.open("a", buffering=1)
    self._board = _summary_writer()(
      str(Path(workdir) / "tensorboard"), purge_step=start_step + 1
    )

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """Adds one object to metrics.jsonl, and the scalars to TensorBoard.

    What is not finite is left out: JSON has no word for it.
    """
    if not self._writes:
      return
    scalars = {k: v for k, v in scalars.items() if math.isfinite(v)}
    self._file.write(json.dumps({"step": step, **scalars}) + "\n")
    for name, value in scalars.items():
      self._board.add_scalar(name, value, step)

  def event(self, name: str, step: int, **details: Any) -> None:
    """Adds an object with `event`, its name, to metrics.jsonl alone."""
    if self._writes:
      line = {"step": step, "event": name, **details}
      self._file.write(json.dumps(line) + "\n")

  def write_picture(self, step: int, name: str, picture: np.ndarray) -> None:
    """Adds uint8 (H, W, 3) to TensorBoard."""
    if self._writes:
      self._board.add_image(name, picture, step, dataformats="HWC")

  def close(self) -> None:
    if self._writes:
      self._file.close()
      self._board.close()


def _summary_writer() -> type:
  """tensorboardX's, without PyTorch.

  It imports that wherever it is installed, only to name a type: 3 seconds at
  each start.
  """
  hidden = "torch" not in sys.modules
  if hidden:
    sys.modules["torch"] = None  # which makes an import fail
  try:
    from tensorboardX import SummaryWriter
  finally:
    if hidden:
      del sys.modules["torch"]
  return SummaryWriter


def _step_of(line: str) -> float:
  try:
    return json.loads(line)["step"]
  except (ValueError, KeyError):
    return float("inf")  # the half-written last line of a killed run


class Progress:
  """The line that tells how far a run is.

  A bar with ETA on a terminal; in a log file one plain line per report. Of
  several processes only the first speaks.
  """

  def __init__(self, total: int, *, start: int):
    self._total = total
    self._speaks = jax.process_index() == 0
    self._bar = tqdm(
      total=total,
      initial=start,
      unit="step",
      dynamic_ncols=True,
      # Steps are slow on small machines: show each.
      mininterval=0.5,
      disable=not (self._speaks and sys.stderr.isatty()),
      bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} "
      "[{elapsed}<{remaining}{postfix}]",
    )

  def step(self) -> None:
    self._bar.update()

  def report(self, step: int, scalars: dict[str, float]) -> None:
    """Shows the losses and rates of MetricWriter's scalars."""
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
      # Room is short, and the end is cut off.
      self._bar.set_postfix_str(text.replace("loss_", ""))
      return
    remaining = (self._total - step) * scalars["time/step_secs"]
    self.say(
      f"step {step}/{self._total}: {text}, "
      f"ETA {tqdm.format_interval(remaining)}"
    )

  def say(self, line: str) -> None:
    """Prints a line that stays, above the bar where there is one."""
    if self._speaks:
      tqdm.write(line, file=sys.stdout)
      sys.stdout.flush()

  def close(self) -> None:
    self._bar.close()
