"""Weights published by the MARLIN authors: downloaded by name and cached."""

from __future__ import annotations

import shutil
import urllib.request
from pathlib import Path

from marlin_jax.records import folders
from marlin_jax.weights.weights import WeightsError

NAMES = tuple(f"marlin_vit_{size}_ytf" for size in ("small", "base", "large"))
_ADDRESS = "https://github.com/ControlNet/MARLIN/releases/download/model_v1/"
_TIMEOUT_SECS = 20
_BLOCK_BYTES = 1 << 20


def resolve(source: str, *, full: bool = False) -> Path:
  """Returns the file of a published model, downloaded on first use, or a path.

  The file is kept in `$MARLIN_HOME/models` (by default in
  ~/.cache/marlin_jax/models). Without a network, put it there by hand.

  Args:
    source: one of NAMES, or a path, which is returned as it is.
    full: use the file with the decoder instead of the encoder alone.

  Raises:
    WeightsError: the file does not exist and cannot be downloaded.
  """
  if source not in NAMES:
    if Path(source).expanduser().exists():
      return Path(source).expanduser()
    raise WeightsError(
      f"no weights at '{source}': neither a file nor a folder, nor one of the "
      f"published models {', '.join(NAMES)}"
    )
  name = f"{source}.{'full' if full else 'encoder'}.pt"
  path = folders.cache_home() / "models" / name
  if not path.is_file():
    _download(_ADDRESS + name, path)
  return path


def _download(address: str, path: Path) -> None:
  from tqdm import tqdm

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
  except OSError as e:  # URLError is one
    raise WeightsError(
      f"{path.name} could not be downloaded from {address}: {e}\nWithout a "
      f"network, download that file elsewhere and put it at {path}, or give "
      "its path instead of the name."
    ) from e
