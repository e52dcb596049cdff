"""Opens MediaPipe Tasks from verified files, quietly, with clear errors."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from marlin_jax.records.cli import UserError


class ModelError(UserError):
  """A model does not run on this machine; the message says what to do."""


@contextlib.contextmanager
def open_task(task_name: str, model: Path, **options: Any) -> Iterator[Any]:
  """Opens a vision Task in IMAGE mode on the CPU, and closes it at the end.

  IMAGE mode keeps nothing from one picture to the next, so that the result
  for a frame depends on that frame alone.

  Args:
    task_name: a class of `mediapipe.tasks.python.vision`, e.g. 'FaceDetector'.
    model: file of the model.
    **options: further fields of the options class of the Task.

  Raises:
    ModelError: a system library is missing, or the Task does not open.
  """
  with _captured_stderr() as log:
    try:
      from mediapipe.tasks.python import BaseOptions, vision

      task = getattr(vision, task_name).create_from_options(
        getattr(vision, f"{task_name}Options")(
          base_options=BaseOptions(
            model_asset_path=str(model), delegate=BaseOptions.Delegate.CPU
          ),
          running_mode=vision.RunningMode.IMAGE,
          **options,
        )
      )
      # TFLite prints most of its notes at the first picture.
      run = "segment" if task_name == "ImageSegmenter" else "detect"
      getattr(task, run)(as_image(np.zeros((64, 64, 3), np.uint8)))
    except OSError as e:
      raise ModelError(
        f"MediaPipe cannot load a system library: {e}. On Debian or Ubuntu: "
        "apt-get install --no-install-recommends "
        "libgl1 libglib2.0-0 libegl1 libgles2"
      ) from e
    except (RuntimeError, ValueError) as e:
      raise ModelError(
        f"MediaPipe's {task_name} does not open {model}: {e}\n{_tail(log)}"
      ) from e
  try:
    yield task
  finally:
    with _captured_stderr():
      task.close()


def as_image(rgb: np.ndarray) -> Any:
  """Wraps uint8 (H, W, 3) RGB as `mediapipe.Image`."""
  import mediapipe

  return mediapipe.Image(
    mediapipe.ImageFormat.SRGB, np.ascontiguousarray(rgb, dtype=np.uint8)
  )


@contextlib.contextmanager
def _captured_stderr() -> Iterator[IO[bytes]]:
  """Redirects the standard error of this process to a file.

  The C++ libraries write to file descriptor 2 directly, past `sys.stderr` and
  past every log level, and would break a progress bar.
  """
  sys.stderr.flush()
  saved = os.dup(2)
  try:
    with tempfile.TemporaryFile() as log:
      os.dup2(log.fileno(), 2)
      try:
        yield log
      finally:
        sys.stderr.flush()
        os.dup2(saved, 2)
  finally:
    os.close(saved)


def _tail(log: IO[bytes], num_bytes: int = 2000) -> str:
  log.seek(0)
  return log.read()[-num_bytes:].decode(errors="replace")
