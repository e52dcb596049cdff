"""Miniature folders of published data sets, without the videos."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np

METHODS = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures")
MOSEI_SEGMENTS = "Raw/Videos/Segmented/Combined"


def touch(root: Path, *names: str) -> None:
  """Writes empty files: no layout opens a video."""
  for name in names:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")


# --- CelebV-HQ ----------------------------------------------------------------


def celebvhq_clip(
  source: str,
  appearance: Sequence[int],
  action: Sequence[int],
  emotion="neutral",
) -> dict:
  """Returns the entry of a clip in celebvhq_info.json."""
  return {
    "ytb_id": source,
    "duration": {"start_sec": 1.0, "end_sec": 4.5},
    "bbox": {"top": 0.1, "bottom": 0.9, "left": 0.2, "right": 0.7},
    "attributes": {
      "appearance": list(appearance),
      "action": list(action),
      "emotion": {"sep_flag": emotion != "neutral", "labels": emotion},
    },
    "version": "v0.1",
  }


def write_celebvhq_info(root: Path, clips: Mapping[str, dict]) -> None:
  info = {
    "meta_info": {
      "appearance_mapping": [f"look_{k}" for k in range(40)],
      "action_mapping": [f"act_{k}" for k in range(35)],
    },
    "clips": clips,
  }
  (root / "celebvhq_info.json").write_text(json.dumps(info))


# --- FaceForensics++ ----------------------------------------------------------


def write_ffpp_splits(
  root: Path, pairs: Mapping[str, Iterable[Sequence[str]]]
) -> None:
  (root / "splits").mkdir()
  for split, of in pairs.items():
    (root / f"splits/{split}.json").write_text(json.dumps(list(of)))


def ffpp_real(name: str) -> str:
  return f"original_sequences/youtube/c23/videos/{name}.mp4"


def ffpp_fake(method: str, target: str, source: str) -> str:
  return f"manipulated_sequences/{method}/c23/videos/{target}_{source}.mp4"


# --- CMU-MOSEI ----------------------------------------------------------------


def write_mosei_labels(
  root: Path, videos: Mapping[str, Sequence[tuple[float, Sequence[float]]]]
) -> None:
  """Writes the start and the seven numbers of each segment of each video."""
  with h5py.File(root / "CMU_MOSEI_Labels.csd", "w") as file:
    for name, rows in videos.items():
      group = file.create_group(f"All Labels/data/{name}")
      group["features"] = np.float32([numbers for _, numbers in rows])
      group["intervals"] = np.float32([[at, at + 2] for at, _ in rows])
    file.create_group("All Labels/metadata")


def write_mosei_transcripts(root: Path, texts: Mapping[str, str]) -> None:
  folder = root / "Raw/Transcript/Segmented/Combined"
  folder.mkdir(parents=True)
  for name, text in texts.items():
    (folder / f"{name}.txt").write_text(text)
