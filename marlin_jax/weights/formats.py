"""Opening weights whatever their format is."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from marlin_jax.records.schema import FRAME_SIZE
from marlin_jax.weights import (
  huggingface,
  marlin_pytorch,
  published,
  run_checkpoint,
  safetensors_folder,
  videomae,
)
from marlin_jax.weights.weights import (
  Architecture,
  Weights,
  WeightsError,
  of_modules,
)

# The source of an untrained encoder.
RANDOM = "random"

# Name on the command line -> its module, which has `read` and `write`.
FORMATS = {
  "safetensors": safetensors_folder,
  "marlin": marlin_pytorch,
  "hf": huggingface,
  "videomae": videomae,
  "orbax": run_checkpoint,
}


def format_of(path: Path) -> str:
  """A key of FORMATS.

  Raises:
    WeightsError: it is none of them; the message lists what would be.
  """
  if not path.exists():
    raise WeightsError(f"no weights at {path}: there is no such file or folder")
  if path.is_dir():
    for name, is_it in (
      ("safetensors", safetensors_folder.is_native),
      ("hf", huggingface.is_huggingface),
      ("orbax", run_checkpoint.is_run),
    ):
      if is_it(path):
        return name
  elif path.suffix in (".pt", ".ckpt"):
    return "marlin"
  elif path.suffix == ".pth":
    return "videomae"
  raise WeightsError(
    f"{path} is in no format known here: expected a folder with config.json "
    "and model.safetensors (marlin_jax or HuggingFace VideoMAE), the workdir "
    "of a run, the authors' .pt or .ckpt, or VideoMAE's .pth"
  )


def read(path: str | Path, format: str = "", **options) -> Weights:
  """Reads weights.

  Args:
    path: a file or folder.
    format: a key of FORMATS; '': whatever it looks like.
    **options: of that module's `read`.

  Raises:
    WeightsError: there are none, or they cannot be read or do not fit, or the
      format knows no such option.
  """
  path = Path(path).expanduser()
  format = format or format_of(path)
  return call(FORMATS[format].read, path, f"reading {format}", options)


def open_encoder(source: str, random_sizes: Mapping[str, Any]) -> Weights:
  """Opens an encoder for the face crops of records.

  Args:
    source: a path, the name of a published model, or RANDOM for an encoder with
      freshly initialised weights.
    random_sizes: fields of the Architecture of such an encoder.

  Raises:
    WeightsError: there are no such weights, or the encoder takes frames of
      another size than FRAME_SIZE.
  """
  if source == RANDOM:
    architecture = Architecture(**random_sizes)
    encoder = architecture.make_autoencoder()
    weights = of_modules(architecture, nnx.to_pure_dict(nnx.state(encoder)))
    return dataclasses.replace(weights, source=RANDOM)
  weights = read(published.resolve(source, full=False))
  size = weights.architecture.image_size
  if size != FRAME_SIZE:
    raise WeightsError(
      f"{source} takes frames of {size} pixels, but records hold face crops of "
      f"{FRAME_SIZE} pixels"
    )
  return weights


def call(function, path, what: str, options: dict, *args):
  """Calls a format's function with the options that were given.

  Raises:
    WeightsError: it has no such option.
  """
  known = inspect.signature(function).parameters
  wrong = sorted(options.keys() - known.keys())
  if wrong:
    raise WeightsError(
      f"{', '.join('--' + name for name in wrong)} has no meaning for {what}"
    )
  return function(*args, path, **options)
