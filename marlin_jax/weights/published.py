"""The authors' published models: by name, from their address, cached."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from pathlib import Path

from marlin_jax.records import folders
from marlin_jax.weights.weights import WeightsError

NAMES = tuple(f"marlin_vit_{size}_ytf" for size in ("small", "base", "large"))
_ADDRESS = "https://github.com/ControlNet/MARLIN/releases/download/model_v1/"
_TIMEOUT_SECS = 20


def resolve(source: str, *, full: bool = False) -> Path:
  """The file behind a name, downloaded on first use; a path stays a path.

  The file is kept in MARLIN_HOME (default ~/.cache/marlin_jax), below models/;
  without a network, put it there by hand.

  Args:
    source: one of NAMES, or a path.
    full: the file with the decoder instead of the encoder alone.

  Raises:
    WeightsError: the file is not there and cannot be downloaded.
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
  partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
  print(
    f"Downloading {address}\n(by the MARLIN authors, CC BY-NC 4.0: not for "
    "commercial use)",
    flush=True,
  )
  try:
    with (
      urllib.request.urlopen(address, timeout=_TIMEOUT_SECS) as response,
      partial.open("wb") as file,
      tqdm(
        total=int(response.headers.get("Content-Length", 0)) or None,
        unit="B",
        unit_scale=True,
        desc=path.name,
      ) as bar,
    ):
      while block := response.read(1 << 20):
        file.write(block)
        bar.update(len(block))
      expected = bar.total
    if expected and partial.stat().st_size != expected:
      raise OSError(
        f"{partial.stat().st_size} bytes of {expected} came through"
      )
    partial.replace(path)
  except (OSError, urllib.error.URLError) as e:
    raise WeightsError(
      f"{path.name} could not be downloaded from {address}: {e}\nWhere there "
      f"is no network, fetch that file elsewhere and put it at {path}, or "
      "give its path instead of the name."
    ) from e
  finally:
    partial.unlink(missing_ok=True)
