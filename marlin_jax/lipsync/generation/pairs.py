"""Generates the videos of a pair list: the sound of one, the face of another.

  python -m marlin_jax.eval.ls --config=configs/eval_ls.py --mode=generate \\
    --generator=runs/ls --pairs=lrs2.txt --root=LRS2/main --output=OUTPUT

Wav2Lip's scores on LRS2, LRS3 and LRW are of such lists, evaluation/
test_filelists in github.com/Rudrabha/Wav2Lip; what is drawn, and which pairs
are left out, follows gen_videos_from_filelist.py there. A run may be stopped at
any moment; the same command resumes it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from marlin_jax.inference.face_windows import FaceVideoError
from marlin_jax.lipsync.generation.drawing import FaceDrawer
from marlin_jax.lipsync.generation.generate import (
  MARK_NOTICE,
  GenerationError,
  generate,
)
from marlin_jax.records import cli
from marlin_jax.records.folders import OutputFolderError, write_bytes

STATE = "pairs.json"
# Of paths in the published lists, which have none.
_SUFFIX = ".mp4"
# Problems of a list that are told.
_MAX_PROBLEMS = 20


class Pair(NamedTuple):
  """A line of a pair list: whose sound, and whose face."""

  sound: Path
  video: Path


def read_pairs(path: str | os.PathLike, root: str | os.PathLike) -> list[Pair]:
  """Reads a pair list.

  Args:
    path: text file; each line names sound and video, separated by a space,
      relative to `root`. A path without a suffix is of an MP4, as in the
      published lists.
    root: folder of the files.

  Raises:
    GenerationError: the file cannot be read, or a line has not two paths, or a
      file does not exist.
  """
  try:
    lines = Path(path).read_text().splitlines()
  except (OSError, UnicodeDecodeError) as e:
    raise GenerationError(f"cannot read the pair list {path}: {e}") from e
  pairs, problems = [], []
  for number, line in enumerate(lines, 1):
    names = line.split()
    if len(names) != 2:
      problems.append(
        f"line {number}: expected two paths, sound and video, found {line!r}"
      )
      continue
    files = [Path(root) / name for name in names]
    files = [f if f.suffix else f.with_name(f.name + _SUFFIX) for f in files]
    problems += [
      f"line {number}: there is no {file}"
      for file in files
      if not file.exists()
    ]
    pairs.append(Pair(*files))
  if problems or not pairs:
    problems = problems or ["it has no lines"]
    raise GenerationError(
      "\n  ".join(
        [
          f"{path} with --root={root}: {cli.counted(len(problems), 'problem')}",
          *problems[:_MAX_PROBLEMS],
        ]
      )
    )
  return pairs


def run(
  drawer: FaceDrawer,
  path: str | os.PathLike,
  root: str | os.PathLike,
  output: str | os.PathLike,
) -> None:
  """Writes OUTPUT/N.mp4 for line N, from 0, and prints what was left out.

  OUTPUT/pairs.json keeps what is done. A pair is left out, and tried again by
  the next run, where the video is shorter than the sound, shows no face or
  cannot be read.

  Args:
    drawer: draws the faces; see `generate.load_generator`.
    path, root: see `read_pairs`.
    output: the folder; created if missing.

  Raises:
    GenerationError: the list cannot be used, or no pair gives a video.
    OutputFolderError: the folder holds videos of another list or generator.
    UserError: a face model or a system library is missing.
  """
  from tqdm import tqdm

  from data_prep.video import video_to_records

  pairs, output = read_pairs(path, root), Path(output)
  identity = {
    "pairs_sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest(),
    "generator_sha256": drawer.sha256(),
  }
  done = _open(output, identity)
  left_out: dict[str, str] = {}
  with (
    video_to_records.Models() as models,
    tqdm(total=len(pairs), unit="video", disable=None) as bar,
  ):
    for number, pair in enumerate(pairs):
      name = f"{number}.mp4"
      bar.set_description(name)
      if name not in done:
        try:
          generate(
            drawer,
            pair.video,
            pair.sound,
            output / name,
            as_published=True,
            models=models,
          )
        except (FaceVideoError, GenerationError) as e:
          left_out[name] = str(e)
        else:
          done.append(name)
        _save(output, identity, done, left_out)
      bar.update()
  reasons = cli.reasons(left_out)
  if not done:
    raise GenerationError(
      "\n".join([f"no pair of {path} gives a video:", *reasons])
    )
  print(f"{output}: {cli.counted(len(done), 'video')}")
  if left_out:
    print(
      "\n".join([f"left out: {cli.counted(len(left_out), 'pair')}", *reasons])
    )
  print(MARK_NOTICE, flush=True)


def _open(output: Path, identity: Mapping[str, str]) -> list[str]:
  """Returns the names of the videos that an earlier run left."""
  output.mkdir(parents=True, exist_ok=True)
  if not (output / STATE).exists():
    if any(output.glob("*.mp4")):
      raise OutputFolderError(
        f"{output} holds videos that were made otherwise; choose another "
        "--output"
      )
    return []
  state = json.loads((output / STATE).read_text())
  for key, what in (
    ("pairs_sha256", "another pair list"),
    ("generator_sha256", "another generator"),
  ):
    if state[key] != identity[key]:
      raise OutputFolderError(
        f"{output} holds videos of {what}; choose another --output"
      )
  return [name for name in state["done"] if (output / name).exists()]


def _save(
  output: Path,
  identity: Mapping[str, str],
  done: list[str],
  left_out: Mapping[str, str],
) -> None:
  state = {**identity, "done": done, "left_out": left_out}
  write_bytes(output / STATE, (json.dumps(state, indent=1) + "\n").encode())
