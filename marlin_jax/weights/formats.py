"""Opens weights: of any format, by path or by the name of a published model."""

from __future__ import annotations

import dataclasses
import http.client
import inspect
import shutil
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from flax import nnx
from tqdm import tqdm

from marlin_jax.records import folders
from marlin_jax.records.schema import FRAME_SIZE
from marlin_jax.weights import (
  hub,
  huggingface,
  marlin_pytorch,
  run_checkpoint,
  safetensors_folder,
  videomae,
)
from marlin_jax.weights.architecture import Architecture
from marlin_jax.weights.weights import Weights, WeightsError, of_modules

# The source of an untrained encoder.
RANDOM = "random"

# Name on the command line -> module with `read(path, **options) -> Weights` and
# `write(weights, path, **options) -> notices`.
FORMATS = {
  "safetensors": safetensors_folder,
  "marlin": marlin_pytorch,
  "hf": huggingface,
  "videomae": videomae,
  "orbax": run_checkpoint,
}
# Suffixes of formats that are one file.
FILE_SUFFIXES = (".pt", ".ckpt", ".pth")

# Models that the MARLIN authors published, with their widths.
PUBLISHED = {
  "marlin_vit_small_ytf": 384,
  "marlin_vit_base_ytf": 768,
  "marlin_vit_large_ytf": 1024,
}
_ADDRESS = "https://github.com/ControlNet/MARLIN/releases/download/model_v1/"
# Where marlin-pytorch keeps them, in the current folder.
_AUTHORS_CACHE = Path(".marlin")
_TIMEOUT_SECS = 20
_BLOCK_BYTES = 1 << 20


# --- formats ------------------------------------------------------------------


def module_of(format: str) -> ModuleType:
  """Returns the module that reads and writes a format.

  Args:
    format: a key of FORMATS.

  Raises:
    WeightsError: there is no such format.
  """
  if format not in FORMATS:
    raise WeightsError(
      f"no format '{format}': expected one of {', '.join(FORMATS)}"
    )
  return FORMATS[format]


def format_of(path: Path) -> str:
  """Returns the key of FORMATS that a file or folder has.

  Raises:
    WeightsError: it has none of them; the message lists them.
  """
  if not path.exists():
    if run_checkpoint.is_run(path):
      return "orbax"
    raise WeightsError(f"no weights at {path}: there is no such file or folder")
  if path.is_dir():
    for name, matches in (
      ("safetensors", safetensors_folder.is_native),
      ("hf", huggingface.is_huggingface),
      ("marlin", marlin_pytorch.is_hub_folder),
      ("orbax", run_checkpoint.is_run),
    ):
      if matches(path):
        return name
  elif path.suffix in (".pt", ".ckpt"):
    return "marlin"
  elif path.suffix == ".pth":
    return "videomae"
  raise WeightsError(
    f"{path} has an unknown format: expected a folder with config.json and "
    "model.safetensors (marlin_jax, HuggingFace VideoMAE or the authors'), the "
    "workdir of a run, the authors' .pt or .ckpt, or VideoMAE's .pth"
  )


def read(path: str | Path, format: str = "", **options) -> Weights:
  """Reads weights.

  Args:
    path: a file or folder.
    format: a key of FORMATS; '': recognised from the path.
    **options: options of that module's `read`.

  Raises:
    WeightsError: there are no weights, they cannot be read or do not fit, or
      there is no such format or option.
  """
  path = Path(path).expanduser()
  format = format or format_of(path)
  return call(module_of(format).read, path, f"reading {format}", options)


def open_encoder(source: str, random_sizes: Mapping[str, Any]) -> Weights:
  """Opens an encoder for the face crops of records.

  Args:
    source: a path, the name of a published model, or RANDOM for an encoder with
      freshly initialised weights.
    random_sizes: fields of the Architecture of such an encoder.

  Raises:
    WeightsError: there are no such weights, or the encoder takes frames that
      are larger than FRAME_SIZE.
  """
  if source == RANDOM:
    architecture = Architecture(**random_sizes)
    encoder = architecture.make_autoencoder()
    weights = of_modules(architecture, nnx.to_pure_dict(nnx.state(encoder)))
    return dataclasses.replace(weights, source=RANDOM)
  weights = read(resolve(source, full=False))
  size = weights.architecture.image_size
  if size > FRAME_SIZE:
    raise WeightsError(
      f"{source} takes frames of {size} pixels, but records hold face crops of "
      f"{FRAME_SIZE} pixels"
    )
  return weights


def call(function, path, action: str, options: dict, *args):
  """Calls function(*args, path, **options) of a format.

  Args:
    function: `read` or `write` of a format's module.
    path: a file or folder.
    action: description of the operation, for the message.
    options: options by name.
    *args: arguments before the path.

  Raises:
    WeightsError: the function has no such option.
  """
  parameters = inspect.signature(function).parameters
  unknown = sorted(options.keys() - parameters.keys())
  if unknown:
    flags = ", ".join(f"--{name}" for name in unknown)
    raise WeightsError(f"{flags} has no meaning for {action}")
  return function(*args, path, **options)


# --- published models ---------------------------------------------------------


def resolve(source: str, *, full: bool = False) -> Path:
  """Returns a path, or the place of a model that is downloaded on first use.

  The file is kept in `$MARLIN_HOME/models` (by default in
  ~/.cache/marlin_jax/models). Without a network, put it there by hand. One that
  marlin-pytorch has downloaded into ./.marlin is used too.

  Args:
    source: one of PUBLISHED; a name on the HuggingFace hub, see `hub.fetch`;
      or a path, which is returned as it is.
    full: use the file with the decoder instead of the encoder alone.

  Raises:
    WeightsError: the file does not exist and cannot be downloaded.
  """
  if source not in PUBLISHED:
    path = Path(source).expanduser()
    if path.exists() or run_checkpoint.is_run(path):
      return path
    if hub.is_id(source):
      return hub.fetch(source)
    raise WeightsError(
      f"no weights at '{source}': neither a file nor a folder, nor one of the "
      f"published models {', '.join(PUBLISHED)}, nor OWNER/NAME on the "
      "HuggingFace hub"
    )
  name = f"{source}.{'full' if full else 'encoder'}.pt"
  path = folders.cache_home() / "models" / name
  if not path.is_file():
    theirs = _AUTHORS_CACHE / name
    if theirs.is_file():
      return theirs
    _download(_ADDRESS + name, path)
  return path


def downloaded() -> list[Path]:
  """Returns the files of published models that were downloaded."""
  folder = folders.cache_home() / "models"
  return sorted(
    path for name in PUBLISHED for path in folder.glob(f"{name}.*.pt")
  )


def _download(address: str, path: Path) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  print(
    f"Downloading {address}\n(by the MARLIN authors, CC BY-NC 4.0: not for "
    "commercial use)",
    flush=True,
  )
  try:
    with (
      urllib.request.urlopen(address, timeout=_TIMEOUT_SECS) as response,
      folders.atomic_path(path) as partial,
      partial.open("wb") as file,
    ):
      size = int(response.headers.get("Content-Length", 0)) or None
      with tqdm.wrapattr(file, "write", size, desc=path.name) as progress:
        shutil.copyfileobj(response, progress, _BLOCK_BYTES)
      if size and file.tell() != size:
        raise OSError(f"received {file.tell()} of {size} bytes")
  except (OSError, http.client.HTTPException) as e:  # URLError is an OSError
    raise WeightsError(
      f"{path.name} could not be downloaded from {address}: {e}\nWithout a "
      f"network, download that file elsewhere and put it at {path}, or give "
      "its path instead of the name."
    ) from e
