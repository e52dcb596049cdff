"""FaceForensics++ (Rössler et al., ICCV 2019): real and manipulated faces.

  original_sequences/youtube/COMPRESSION/videos/TARGET.mp4
  manipulated_sequences/METHOD/COMPRESSION/videos/TARGET_SOURCE.mp4
  splits/train.json, val.json, test.json       [["071", "054"], ...]

Labels: fake (0 or 1), and manipulation (original or the method). Both people of
a pair are one subject, so that no face appears in two splits. DeepFakeDetection
and FaceShifter, which the download may include, are left out: the paper's
numbers do not use them.
"""

from __future__ import annotations

import json
from pathlib import Path

from data_prep.sources.listing import (
  BINARY,
  CLASS,
  Label,
  Listing,
  ManifestError,
  Row,
  missing_notes,
)

COMPRESSIONS = ("c0", "c23", "c40")
METHODS = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures")
MANIPULATIONS = ("original", *METHODS)
SPLITS = ("train", "val", "test")


def read(root: Path, compression: str) -> Listing:
  """Lists the available videos of the official splits.

  Args:
    root: folder of original_sequences, manipulated_sequences and splits.
    compression: 'c0' (raw), 'c23' or 'c40'.

  Raises:
    ManifestError: a split is missing or malformed, or there is no video.
  """
  rows, num_missing = [], 0
  for split in SPLITS:
    for pair in _pairs(root, split):
      subject = "+".join(sorted(pair))
      videos = [("original", name) for name in pair]
      for method in METHODS:
        videos += [(method, "_".join(p)) for p in (pair, pair[::-1])]
      for manipulation, name in videos:
        path = _path(manipulation, compression, name)
        if not (root / path).exists():
          num_missing += 1
          continue
        labels = {
          "fake": (float(manipulation != "original"),),
          "manipulation": (float(MANIPULATIONS.index(manipulation)),),
        }
        rows.append(Row(0, path, subject, split, labels))
  if not rows:
    raise ManifestError(
      f"{root} has no video of FaceForensics++ at {compression}; expected "
      f"files such as {_path('original', compression, '071')} and "
      f"{_path('Deepfakes', compression, '071_054')}"
    )
  num_listed = num_missing + len(rows)
  what = f"videos in splits/ at {compression}"
  notes = missing_notes(num_missing, num_listed, what)
  labels = {
    "fake": Label(BINARY, ("fake",)),
    "manipulation": Label(CLASS, MANIPULATIONS),
  }
  return Listing(root, rows, labels, notes=notes)


def _path(manipulation: str, compression: str, name: str) -> str:
  folder = f"manipulated_sequences/{manipulation}"
  if manipulation == "original":
    folder = "original_sequences/youtube"
  return f"{folder}/{compression}/videos/{name}.mp4"


def _pairs(root: Path, split: str) -> list[tuple[str, str]]:
  path = root / "splits" / f"{split}.json"
  if not path.is_file():
    raise ManifestError(
      f"{path} is missing; copy the folder dataset/splits of the code of "
      "FaceForensics++ there"
    )
  try:
    pairs = [(first, second) for first, second in json.loads(path.read_bytes())]
  except (ValueError, TypeError) as e:
    raise ManifestError(f"{path} is not a list of pairs: {e}") from e
  bad = [
    p for p in pairs if not all(isinstance(n, str) and n.isdigit() for n in p)
  ]
  if bad or not pairs:
    raise ManifestError(
      f"{path} is not a list of pairs such as ['071', '054']: "
      f"{bad[:1] or 'empty'}"
    )
  return pairs
