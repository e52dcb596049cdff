"""Extras of the package, such as marlin-jax[train], and what they install."""

from __future__ import annotations

import importlib.util

from marlin_jax.records.cli import UserError

# Extra of pyproject.toml -> modules that it makes importable and that the
# package alone lacks.
LIBRARIES = {
  "features": ("av", "cv2", "mediapipe"),
  "train": (
    *("array_record", "grain", "orbax", "scipy", "simplejpeg"),
    *("tensorboardX", "zstandard"),
  ),
  "prepare": (
    *("array_record", "av", "cv2", "mediapipe", "simplejpeg"),
    *("tensorflow_datasets", "zstandard"),
  ),
  "demo": ("av", "cv2", "gradio", "mediapipe"),
  "trackio": ("trackio",),
  "wandb": ("wandb",),
}


class MissingLibraryError(UserError):
  """A library is not installed; the message names the extra that has it."""


def missing(extra: str) -> list[str]:
  """Returns the modules of an extra, a key of LIBRARIES, that are missing."""
  return [
    name for name in LIBRARIES[extra] if importlib.util.find_spec(name) is None
  ]


def require(extra: str, purpose: str) -> None:
  """Checks that an extra is installed.

  Args:
    extra: a key of LIBRARIES.
    purpose: the work that needs it, at the start of the message.

  Raises:
    MissingLibraryError: it is not.
  """
  if names := missing(extra):
    raise MissingLibraryError(
      f"{purpose} needs {', '.join(names)}: pip install 'marlin-jax[{extra}]'"
    )
