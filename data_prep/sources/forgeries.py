r"""Data sets of manipulated faces: FaceForensics++, Celeb-DF v2, DFDC.

FaceForensics++ (Rössler et al., ICCV 2019):

  original_sequences/youtube/COMPRESSION/videos/TARGET.mp4
  manipulated_sequences/METHOD/COMPRESSION/videos/TARGET_SOURCE.mp4
  splits/train.json, val.json, test.json       [["071", "054"], ...]

COMPRESSION is raw, c23 or c40; raw is c0 in older downloads. Both people of a
pair are one subject, so that no face appears in two splits. DeepFakeDetection
and FaceShifter, which the download may include, are left out: the paper's
numbers do not use them.

Celeb-DF v2 (Li et al., CVPR 2020):

  Celeb-real/idN_NNNN.mp4, Celeb-synthesis/idN_idN_NNNN.mp4
  YouTube-real/NNNNN.mp4
  List_of_testing_videos.txt                   1 YouTube-real/00170.mp4

The list is the split test, all others are train. Nothing keeps a person in one
of them, so none is recorded as a subject. The folders are those of
github.com/yuezunli/celeb-deepfakeforensics, the list that of loaders of others.

DFDC (Dolhansky et al., 2020), the parts of the training set at Kaggle:

  dfdc_train_part_N/NAME.mp4, dfdc_train_part_N/metadata.json

A fake and its original are one subject; 10% of these go to val and 10% to
test, since the training set has no official parts. Names are those of loaders
of others.

Labels: fake (0 or 1), and of FaceForensics++ manipulation (original or the
method).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from data_prep.sources import files
from data_prep.sources.listing import (
  BINARY,
  CLASS,
  Label,
  Listing,
  ManifestError,
  Row,
  missing_notes,
)
from data_prep.sources.patterns import Flag, Listed, Official, Tree, needed

# Names of the folder of each compression.
COMPRESSIONS = {"raw": ("raw", "c0"), "c23": ("c23",), "c40": ("c40",)}
METHODS = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures")
MANIPULATIONS = ("original", *METHODS)
SPLITS = ("train", "val", "test")
FAKE = {"fake": Label(BINARY, ("fake",))}


# --- FaceForensics++ ----------------------------------------------------------


def read_ffpp(
  root: Path, follow_links: bool = False, *, compression: str
) -> Listing:
  """Lists the available videos of the official splits.

  Args:
    root: folder of original_sequences, manipulated_sequences and splits.
    follow_links: enter linked folders.
    compression: key of `COMPRESSIONS`.

  Raises:
    ManifestError: a split is missing or malformed, or there is no video.
  """
  # By one listing: a request for each of the videos takes long.
  existing = {*files.video_paths(root, follow_links)}
  rows, num_listed = [], 0
  for split, pair, manipulation, name in _ffpp_videos(root):
    num_listed += 1
    paths = [
      _ffpp_path(manipulation, folder, name)
      for folder in COMPRESSIONS[compression]
    ]
    path = next((path for path in paths if path in existing), None)
    if path is not None:
      labels = {
        "fake": (float(manipulation != "original"),),
        "manipulation": (float(MANIPULATIONS.index(manipulation)),),
      }
      rows.append(Row(0, path, "+".join(sorted(pair)), split, labels))
  if not rows:
    raise ManifestError(
      f"{root} has no video of FaceForensics++ at {compression}; expected "
      f"files such as {_ffpp_path('original', compression, '071')} and "
      f"{_ffpp_path('Deepfakes', compression, '071_054')}"
    )
  what = f"videos in splits/ at {compression}"
  notes = missing_notes(num_listed - len(rows), num_listed, what)
  labels = FAKE | {"manipulation": Label(CLASS, MANIPULATIONS)}
  return Listing(root, rows, labels, notes=notes)


def _ffpp_videos(
  root: Path,
) -> Iterator[tuple[str, tuple[str, str], str, str]]:
  """Yields split, pair, manipulation and name of each listed video."""
  for split in SPLITS:
    for pair in _pairs(root / "splits" / f"{split}.json"):
      for name in pair:
        yield split, pair, "original", name
      for method in METHODS:
        for direction in (pair, pair[::-1]):
          yield split, pair, method, "_".join(direction)


def _ffpp_path(manipulation: str, compression: str, name: str) -> str:
  folder = f"manipulated_sequences/{manipulation}"
  if manipulation == "original":
    folder = "original_sequences/youtube"
  return f"{folder}/{compression}/videos/{name}.mp4"


def _pairs(path: Path) -> list[tuple[str, str]]:
  if not path.is_file():
    raise ManifestError(
      f"{path} is missing; copy the folder dataset/splits of the code of "
      "FaceForensics++ there"
    )
  try:
    pairs = [(first, second) for first, second in files.read_json(path)]
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


# --- Celeb-DF v2 --------------------------------------------------------------


def _celebdf_tests(root: Path) -> Official:
  path = needed(root, "List_of_testing_videos.txt", "Celeb-DF v2")
  lines = map(str.split, files.read_text(path).split("\n"))
  return Official({line[-1]: Listed("test") for line in lines if line})


CELEBDF = Tree(
  "Celeb-DF v2",
  path=r"(?P<key>(?P<folder>Celeb-real|YouTube-real|Celeb-synthesis)/"
  r"(?:id\d+_|)(?:id\d+_|)\d+\.mp4)",
  example="Celeb-real/id0_0000.mp4",
  key="{key}",
  labels={"fake": Flag("folder", "Celeb-synthesis")},
  official=_celebdf_tests,
  unlisted="train",
)


# --- DFDC ---------------------------------------------------------------------


def read_dfdc(root: Path, follow_links: bool = False) -> Listing:
  """Lists the videos beside each metadata.json.

  Raises:
    ManifestError: there is no metadata.json, one is malformed, or there is no
      video.
  """
  by_folder: dict[str, set[str]] = {}
  for video in files.video_paths(root, follow_links):
    path = PurePosixPath(video)
    by_folder.setdefault(str(path.parent), set()).add(path.name)
  rows, num_listed = [], 0
  for folder, names in sorted(by_folder.items()):
    path = root / folder / "metadata.json"
    if not path.is_file():
      continue
    content = files.read_json(path)
    if not isinstance(content, dict):
      raise ManifestError(f"{path} is not an object of videos and labels")
    for name, entry in content.items():
      num_listed += 1
      try:
        fake = float(["REAL", "FAKE"].index(entry["label"]))
        original = entry.get("original") or name
      except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise ManifestError(
          f"{path}, {name!r} is {entry!r}, expected a label, REAL or FAKE"
        ) from e
      if name in names:
        video = str(PurePosixPath(folder) / name)
        rows.append(Row(0, video, str(original), labels={"fake": (fake,)}))
  if not rows:
    raise ManifestError(
      f"{root} has no video of DFDC; expected folders such as "
      "dfdc_train_part_0/ with metadata.json and its videos"
    )
  notes = missing_notes(num_listed - len(rows), num_listed, "listed videos")
  return Listing(root, rows, FAKE, notes=notes, split_ratios=(0.1, 0.1))
