"""Folders of the HuggingFace hub: downloads them and publishes them.

Needs the extra 'hub'. Only data is downloaded, no code.
"""

from __future__ import annotations

import re
from pathlib import Path

from marlin_jax.weights.weights import WeightsError

_PREFIX = "hf://"
# OWNER/NAME or OWNER/NAME@REVISION.
_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*?)(?:@([\w./-]+))?")
# Files that are data.
_DATA = ("*.json", "*.safetensors", "pytorch_model.bin")


def is_id(source: str) -> bool:
  """Returns whether a source is hf://OWNER/NAME, or OWNER/NAME."""
  return source.startswith(_PREFIX) or bool(_ID.fullmatch(source))


def fetch(source: str) -> Path:
  """Downloads a folder, or finds it in the cache of huggingface_hub.

  Args:
    source: OWNER/NAME or hf://OWNER/NAME, with @REVISION for a branch, tag or
      commit. A commit pins the content.

  Raises:
    WeightsError: huggingface_hub is missing, or there is no such folder.
  """
  name, revision = _parsed(source)
  library = _library(name)
  try:
    folder = library.snapshot_download(
      name, revision=revision, allow_patterns=list(_DATA)
    )
  except (OSError, ValueError, library.errors.HfHubHTTPError) as e:
    raise WeightsError(
      f"'{source}' is no file or folder here, and cannot be fetched from the "
      f"HuggingFace hub: {_reason(e)}"
    ) from e
  return Path(folder)


def push(folder: Path, target: str, *, private: bool = False) -> str:
  """Publishes a folder of weights with its README.md.

  Uses the login of `hf auth login`, or HF_TOKEN. The files of the folder
  replace those of the same names on the hub, in one commit.

  Args:
    folder: the folder, which holds nothing else.
    target: OWNER/NAME or hf://OWNER/NAME, created if missing.
    private: create it as a private one.

  Returns:
    The address of the commit.

  Raises:
    WeightsError: huggingface_hub is missing, or the hub refuses.
  """
  name, revision = _parsed(target)
  library = _library(name)
  try:
    library.create_repo(name, private=private, exist_ok=True)
    commit = library.upload_folder(
      repo_id=name,
      folder_path=folder,
      revision=revision,
      allow_patterns=[*_DATA, "README.md"],
      commit_message="Upload weights with marlin_jax",
    )
  except (OSError, ValueError, library.errors.HfHubHTTPError) as e:
    raise WeightsError(
      f"'{target}' cannot be written on the HuggingFace hub: {_reason(e)}\n"
      "Log in with 'hf auth login', or set HF_TOKEN to a token that may write"
    ) from e
  return commit.commit_url


def _parsed(source: str) -> tuple[str, str | None]:
  match = _ID.fullmatch(source.removeprefix(_PREFIX))
  if match is None:
    raise WeightsError(
      f"'{source}' is no name on the HuggingFace hub, expected OWNER/NAME"
    )
  return match[1], match[2]


def _library(name: str):
  try:
    import huggingface_hub
  except ImportError as e:
    raise WeightsError(
      f"no weights at '{name}'. If it is on the HuggingFace hub: pip install "
      "'marlin-jax[hub]'"
    ) from e
  return huggingface_hub


def _reason(error: Exception) -> str:
  return " ".join(str(error).split())
