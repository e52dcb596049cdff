"""Face parsers: one protocol, and a module for each parser.

mediapipe   the default: polygons of the mesh, hair from a person mask; all
            models come with packages
multiclass  MediaPipe's selfie_multiclass segments hair and skin; polygons of
            the mesh for the rest
farl        the parser of the paper: FaRL fine-tuned on LaPa (TorchScript,
            PyTorch)
bisenet     BiSeNet trained on CelebAMask-HQ (ONNX, onnxruntime)
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from data_prep import assets
from marlin_jax.records.folders import sha256_of

# Parser -> name of its model in `assets.ASSETS`. None: never downloaded, since
# no hash of it is published, and a TorchScript file is a program.
PARSERS: dict[str, str | None] = {
  "mediapipe": "selfie_segmenter.tflite",
  "multiclass": "selfie_multiclass_256x256.tflite",
  "farl": None,
  "bisenet": "resnet18.onnx",
}
FARL_NAME = "face_parsing.farl.lapa.main_ema_136500_jit191.pt"
FARL_URL = (
  f"https://github.com/FacePerceiver/facer/releases/download/models-v1/"
  f"{FARL_NAME}"
)


class Parser(Protocol):
  """A face parser. It keeps no state between calls."""

  def parse(
    self, frame: np.ndarray, box: np.ndarray, landmarks: np.ndarray | None
  ) -> np.ndarray | None:
    """Labels one face.

    Args:
      frame: uint8 (H, W, 3), RGB source frame.
      box: float32 (4,), the crop in source pixels.
      landmarks: float32 (478, 2) in source pixels; None or NaN where the mesh
        was not found.

    Returns:
      uint8 (224, 224), LaPa codes in crop coordinates, or None when no face
      was parsed.
    """
    ...


@runtime_checkable
class TwoStepParser(Parser, Protocol):
  """A parser in two steps: it analyses the pixels, then labels by the mesh.

  The result of the first, slow step changes little from frame to frame, so that
  `track_labels` takes it in some frames only.

  Attributes:
    ANALYSIS_STEPS: distance in frames from one analysis to the next.
  """

  ANALYSIS_STEPS: int

  def analyse(
    self, frame: np.ndarray, box: np.ndarray, landmarks: np.ndarray
  ) -> np.ndarray:
    """Analyses the pixels of one frame.

    Args:
      frame: as for `parse`.
      box: as for `parse`.
      landmarks: as for `parse`, finite.

    Returns:
      uint8 (224, 224, C), maps in crop coordinates.
    """
    ...

  def label(self, maps: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Labels one face.

    Args:
      maps: result of `analyse` for this frame, or blended from two others.
      points: float32 (478, 2), the mesh in crop pixels.

    Returns:
      uint8 (224, 224), LaPa codes.
    """
    ...


@dataclasses.dataclass(frozen=True)
class ParserChoice:
  """A parser and, optionally, the file of its model.

  Attributes:
    name: a key of `PARSERS`.
    path: file of the model; None: download it.

  Raises:
    ValueError: the name is not a key of `PARSERS`.
  """

  name: str = "mediapipe"
  path: Path | None = None

  def __post_init__(self) -> None:
    if self.name not in PARSERS:
      raise ValueError(
        f"no parser {self.name!r}; expected one of {', '.join(PARSERS)}"
      )

  def model_file(self) -> Path:
    """Returns the file of the model; downloads it if needed.

    Raises:
      assets.AssetError: there is no file; the message says where to get it.
    """
    if self.path is not None:
      if not self.path.is_file():
        raise assets.AssetError(
          f"{self.path}, given as the model of the parser {self.name}, is "
          f"not a file. {_where_to_get(self.name)}"
        )
      return self.path
    asset_name = PARSERS[self.name]
    if asset_name is not None:
      return assets.fetch(asset_name)
    folder = os.environ.get("MARLIN_ASSETS")
    if folder and (Path(folder) / FARL_NAME).is_file():
      return Path(folder) / FARL_NAME
    raise assets.AssetError(
      f"the parser {self.name} has no model file. {_where_to_get(self.name)}"
    )

  def model_hash(self) -> dict[str, str]:
    """Returns {file name: SHA-256} of the model, a part of the recipe.

    Raises:
      assets.AssetError: there is no file.
    """
    asset_name = PARSERS[self.name]
    if self.path is None and asset_name is not None:
      return {asset_name: assets.ASSETS[asset_name].sha256}
    file = self.model_file()
    return {file.name: sha256_of(file)}


DEFAULT = ParserChoice()


def _where_to_get(name: str) -> str:
  """Returns a sentence on where to get the model of a parser."""
  asset_name = PARSERS[name]
  if asset_name is None:
    return (
      f"Download {FARL_URL} and give it with --parser_path, or put it into the "
      "folder that the environment variable MARLIN_ASSETS names."
    )
  return (
    f"{asset_name} is at {assets.ASSETS[asset_name].url}; without "
    "--parser_path it is downloaded."
  )


@contextlib.contextmanager
def open_parser(choice: ParserChoice = DEFAULT) -> Iterator[Parser]:
  """Yields an open parser.

  Raises:
    assets.AssetError: there is no model file.
    mediapipe_tasks.ModelError: a library is missing, or the model does not
      open.
  """
  module = importlib.import_module(f"data_prep.regions.{choice.name}")
  with module.open_model(choice.model_file()) as parser:
    yield parser
