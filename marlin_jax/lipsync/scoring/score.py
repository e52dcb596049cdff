"""Scores of talking videos: how well lips and sound agree, how real they look.

Of each video the offset, the least mean distance and the confidence of
`offsets.measure`, over its stretches with a face, as far as its sound goes; of
all of them the means, as Wav2Lip's evaluation/scores_LSE takes them. Beside
real videos, the Frechet distance between the faces of the two sets.

A video is left out of the means, with a reason, if it has no sound track, is
silent throughout, shows no face, is damaged, or is too short for one window.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from marlin_jax.inference import video_folder
from marlin_jax.inference.face_windows import FaceVideoError
from marlin_jax.lipsync.scoring import (
  judges,
  offsets,
  score_files,
  talking_video,
)
from marlin_jax.lipsync.scoring.frame_features import (
  FrameFeatures,
  PixelFeatures,
)
from marlin_jax.lipsync.scoring.frechet import frechet_distance
from marlin_jax.lipsync.scoring.judges import Judge
from marlin_jax.lipsync.scoring.talking_video import FRAME_SAMPLES, TalkingVideo
from marlin_jax.records import cli
from marlin_jax.records.cli import UserError
from marlin_jax.records.mel_spectrogram import MAX_VALUE, mel_spectrogram


class ScoreError(UserError):
  """Nothing can be scored; the message says why."""


@dataclasses.dataclass(frozen=True)
class VideoScore:
  """Of one video.

  Attributes:
    name: its path below the input.
    sync: what the distances say.
    num_frames: of the video, 25 a second.
    num_faceless: of them without a face.
    num_unheard: of them after the sound has ended.
  """

  name: str
  sync: offsets.Sync
  num_frames: int
  num_faceless: int
  num_unheard: int


def score(
  videos: Iterable[str | Path],
  output: str | Path,
  judge: Judge,
  *,
  reals: Iterable[str | Path] = (),
  features: FrameFeatures | None = None,
  crop_face: bool = True,
  max_offset: int = offsets.MAX_OFFSET,
) -> dict[str, Any]:
  """Scores videos and writes down what comes of it.

  Args:
    videos: files, folders or manifests of data_prep.
    output: folder of scores.json, scores.csv, scores.txt and offsets.png;
      created if missing; existing files are replaced.
    judge: SyncNet, for LSE, or an expert.
    reals: real videos to compare the faces with; none, and no Frechet distance.
    features: what faces are compared by; mean colours where None, which is no
      FID.
    crop_face: follow the face and cut it out; False for videos that show face
      crops already, as LRS2 does. Numbers of other crops do not compare.
    max_offset: frames that the sound is shifted by, each way.

  Returns:
    What scores.json holds; see `score_files.results`.

  Raises:
    ScoreError: no video can be scored.
    video_folder.InputError: an input names no videos.
    frame_features.FeatureError: the feature network does not work.
    UserError: this machine lacks a model file or a library.
  """
  found = video_folder.list_videos(videos)
  others = video_folder.list_videos(reals) if (reals := list(reals)) else []
  if others and features is None:
    features = PixelFeatures()
  scored: list[VideoScore] = []
  left_out: dict[str, str] = {}
  faces = [], []  # features: of the videos, of the real ones
  with video_folder.progress_bar([*found, *others]) as bar:
    for one, video in _read(found, crop_face, bar, 0, left_out):
      if others:
        faces[0].extend(_features(video, features))
      try:
        scored.append(score_video(one.name, video, judge, max_offset))
      except ScoreError as e:
        left_out[one.name] = str(e)
    if not scored:
      raise ScoreError(_nothing_scored(left_out))
    for _, video in _read(others, crop_face, bar, len(found), left_out):
      faces[1].extend(_features(video, features))
  results = score_files.results(
    scored, left_out, judge, max_offset=max_offset, crop_face=crop_face
  )
  if others:
    results["frechet"] = _compared(*faces, features.metric_name)
  score_files.write(Path(output), results)
  return results


def score_video(
  name: str,
  video: TalkingVideo,
  judge: Judge,
  max_offset: int = offsets.MAX_OFFSET,
) -> VideoScore:
  """Scores one video.

  Raises:
    ScoreError: it has no sound, is silent, or is too short.
  """
  sound = video.sound
  if not len(sound):
    raise ScoreError("it has no sound track")
  if mel_spectrogram(sound).max() <= -MAX_VALUE:
    raise ScoreError("its sound is silent from beginning to end")
  found = []
  for stretch in talking_video.stretches(video.has_face):
    samples = slice(*(FRAME_SAMPLES * x for x in (stretch.start, stretch.stop)))
    frames, heard = video.frames[stretch], sound[samples]
    if judges.num_windows(len(frames), len(heard), judge.num_frames):
      found.append(
        offsets.distances(*judge.embeddings(frames, heard), max_offset)
      )
  num_heard = len(sound) // FRAME_SAMPLES
  if not found:
    raise ScoreError(
      f"no {judge.num_frames + 1} frames in a row have a face and sound, of "
      f"{len(video)} frames, {int(video.has_face.sum())} of them with a face "
      f"and {num_heard} with sound"
    )
  return VideoScore(
    name=name,
    sync=offsets.measure(found),
    num_frames=len(video),
    num_faceless=int((~video.has_face).sum()),
    num_unheard=max(len(video) - num_heard, 0),
  )


def _read(
  found: Sequence[video_folder.Video],
  crop_face: bool,
  bar: video_folder.VideoBar,
  first: int,
  left_out: dict[str, str],
) -> Iterator[tuple[video_folder.Video, TalkingVideo]]:
  """Yields those that can be read; notes the others, with the reason."""
  if not found:
    return  # no need to open any models
  videos = talking_video.read_many(
    [one.path for one in found],
    crop_face=crop_face,
    progress=lambda number, share: bar.advance(first + number, share),
  )
  for number, (one, video) in enumerate(zip(found, videos, strict=True), first):
    if isinstance(video, FaceVideoError):
      # A real video may have the same name.
      left_out[f"{one.name}{' (real)' if first else ''}"] = video.reason
    else:
      yield one, video
    bar.finish(number)


def _features(
  video: TalkingVideo, features: FrameFeatures
) -> Iterator[np.ndarray]:
  for stretch in talking_video.stretches(video.has_face):
    yield features(video.frames[stretch])


def _compared(
  made: Sequence[np.ndarray], real: Sequence[np.ndarray], metric_name: str
) -> dict[str, Any]:
  if min(sum(map(len, made)), sum(map(len, real))) < 2:
    raise ScoreError(
      f"{metric_name} compares two sets of features, and there are "
      f"{sum(map(len, made))} of the videos and {sum(map(len, real))} of the "
      "real ones, expected at least 2 each; give more or longer videos, or "
      "leave out the real ones"
    )
  a, b = np.concatenate(made), np.concatenate(real)
  return {
    "metric": metric_name,
    "value": frechet_distance(a, b),
    "num_features": len(a),
    "num_real_features": len(b),
    "size": a.shape[1],
  }


def _nothing_scored(left_out: dict[str, str]) -> str:
  return "\n".join(
    [
      f"none of {cli.counted(len(left_out), 'video')} can be scored:",
      *cli.reasons(left_out),
    ]
  )
