"""Scores talking videos: how well lips and sound agree, how real they look.

Each video gets the offset, the lowest mean distance and the confidence of
`offsets.measure`, over its frames with a face, up to the end of its sound. The
result is the mean over the videos, as in Wav2Lip's evaluation/scores_LSE. If
real videos are given, the Frechet distance between the faces of both sets is
computed too.

A video is left out of the means, with a reason, if it has no sound track, is
silent throughout, shows no face, is damaged, or is too short for one window.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from marlin_jax.inference import video_folder
from marlin_jax.inference.face_windows import FaceVideoError
from marlin_jax.lipsync.scoring import (
  face_crops,
  judges,
  mouths,
  offsets,
  report,
  talking_video,
)
from marlin_jax.lipsync.scoring.frame_features import (
  FrameFeatures,
  PixelFeatures,
)
from marlin_jax.lipsync.scoring.frechet import frechet_distance
from marlin_jax.lipsync.scoring.judges import Judge
from marlin_jax.lipsync.scoring.mouths import MouthScore
from marlin_jax.lipsync.scoring.offsets import VideoScore
from marlin_jax.lipsync.scoring.talking_video import FRAME_SAMPLES, TalkingVideo
from marlin_jax.records import cli
from marlin_jax.records.cli import UserError
from marlin_jax.records.mel_spectrogram import MAX_VALUE, mel_spectrogram


class ScoreError(UserError):
  """Raised if nothing can be scored; the message has the reasons."""


def score(
  videos: Iterable[str | Path],
  output: str | Path,
  judge: Judge,
  *,
  reals: Iterable[str | Path] = (),
  features: FrameFeatures | None = None,
  originals: str | Path | None = None,
  are_face_crops: bool = False,
  max_offset: int = offsets.MAX_OFFSET,
) -> dict[str, Any]:
  """Scores videos and writes the results.

  Args:
    videos: files, folders or manifests of data_prep.
    output: folder of scores.json, scores.csv, scores.txt and offsets.png;
      created if missing; those of an earlier score are replaced.
    judge: SyncNet, for LSE-D and LSE-C, or an expert.
    reals: real videos, for the Frechet distance; not computed if empty.
    features: features for the Frechet distance; None: mean colours, which is
      not FID.
    originals: folder of the videos, by the same names, that `videos` were
      generated from with their own sound, to compare the mouths; None: they are
      not compared.
    are_face_crops: the videos are face crops already, as in LRS2; else faces
      are tracked and cropped as the judge needs them. Scores of different crops
      are not comparable.
    max_offset: largest offset in frames, in each direction.

  Returns:
    The content of scores.json, see `report.results`.

  Raises:
    ScoreError: no video can be scored; or, once all else is written, there are
      too few faces for the Frechet distance.
    InputError: an input names no videos.
    FeatureError: the feature network does not work.
    OutputFolderError: `output` holds files of these names by others.
    UserError: a face model or a system library is missing.
  """
  report.check_folder(Path(output))
  crop = face_crops.FRAME if are_face_crops else judge.crop
  listed = video_folder.list_videos(videos)
  if originals is not None:
    _check_originals(listed, Path(originals))
  reals = list(reals)
  listed_reals = video_folder.list_videos(reals) if reals else []
  if listed_reals and features is None:
    features = PixelFeatures()
  scores: list[VideoScore] = []
  left_out: dict[str, str] = {}
  generated_features: list[np.ndarray] = []
  real_features: list[np.ndarray] = []
  with video_folder.progress_bar([*listed, *listed_reals]) as bar:
    for name, video in _read(listed, crop, bar, 0, left_out):
      if listed_reals:
        generated_features += _features(video, features)
      try:
        scores.append(score_video(name, video, judge, max_offset))
      except ScoreError as e:
        left_out[name] = str(e)
    if not scores:
      raise ScoreError(
        "\n".join(
          [
            f"none of {cli.counted(len(left_out), 'video')} can be scored:",
            *cli.reasons(left_out),
          ]
        )
      )
    for _, video in _read(listed_reals, crop, bar, len(listed), left_out):
      real_features += _features(video, features)
  results = report.results(
    scores, left_out, judge, max_offset=max_offset, crop=crop
  )
  if originals is not None:
    report.add_mouths(
      results, *_compared(listed, Path(originals), results["videos"])
    )
  report.write(Path(output), results)
  if listed_reals:  # may fail, where too few real videos can be read
    results["frechet"] = _frechet(
      generated_features, real_features, features.metric_name
    )
    report.write(Path(output), results)
  return results


def score_video(
  name: str,
  video: TalkingVideo,
  judge: Judge,
  max_offset: int = offsets.MAX_OFFSET,
) -> VideoScore:
  """Scores one video.

  Raises:
    ScoreError: the video has no sound, is silent, or is too short.
  """
  sound = video.sound
  if not len(sound):
    raise ScoreError("it has no sound track")
  if mel_spectrogram(sound).max() <= -MAX_VALUE:
    raise ScoreError("its sound is silent from beginning to end")
  distances = []
  for stretch in talking_video.stretches(video.has_face):
    samples = slice(*(FRAME_SAMPLES * x for x in (stretch.start, stretch.stop)))
    frames, heard = video.frames[stretch], sound[samples]
    if judges.num_windows(len(frames), len(heard), judge.num_frames):
      distances.append(
        offsets.distances(*judge.embeddings(frames, heard), max_offset)
      )
  num_heard = len(sound) // FRAME_SAMPLES
  if not distances:
    raise ScoreError(
      f"it has no {judge.num_frames + 1} consecutive frames with a face and "
      f"sound: of {len(video)} frames, {int(video.has_face.sum())} have a face "
      f"and {num_heard} have sound"
    )
  return VideoScore(
    name=name,
    sync=offsets.measure(distances),
    num_frames=len(video),
    num_faceless=int((~video.has_face).sum()),
    num_unheard=max(len(video) - num_heard, 0),
  )


def _read(
  videos: Sequence[video_folder.Video],
  crop: str,
  bar: video_folder.TaskBar,
  first_number: int,
  left_out: dict[str, str],
) -> Iterator[tuple[str, TalkingVideo]]:
  """Yields name and content of videos; adds unreadable ones to `left_out`.

  Args:
    videos: videos to read.
    crop: see `face_crops`.
    bar: progress bar to update.
    first_number: number of the first video in `bar`; above 0 for real videos.
    left_out: reasons by name of a video; updated.
  """
  if not videos:
    return  # no need to open the face models
  contents = talking_video.read_many(
    [video.path for video in videos],
    crop=crop,
    progress=lambda i, share: bar.advance(first_number + i, share),
  )
  for i, (video, content) in enumerate(zip(videos, contents, strict=True)):
    if isinstance(content, FaceVideoError):
      # A generated video may have the same name.
      suffix = " (real)" if first_number else ""
      left_out[f"{video.name}{suffix}"] = content.reason
    else:
      yield video.name, content
    bar.finish(first_number + i)


def _check_originals(
  videos: Sequence[video_folder.Video], originals: Path
) -> None:
  """Raises ScoreError if a video has no original."""
  missing = [v.name for v in videos if not (originals / v.name).is_file()]
  if missing:
    raise ScoreError(
      f"{originals} has no original of {cli.counted(len(missing), 'video')}, "
      f"such as {originals / missing[0]}: expected a video of the same name"
    )


def _compared(
  videos: Sequence[video_folder.Video],
  originals: Path,
  scored: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, MouthScore], dict[str, str]]:
  """Returns the mouth scores of the scored videos, and why others have none."""
  from tqdm import tqdm

  from data_prep.video import video_to_records

  found: dict[str, MouthScore] = {}
  left_out: dict[str, str] = {}
  names = {row["video"] for row in scored}
  videos = [video for video in videos if video.name in names]
  with video_to_records.Models() as models:
    for video in tqdm(videos, desc="mouths", unit="video", disable=None):
      try:
        found[video.name] = mouths.compare(
          video.path, originals / video.name, models
        )
      except FaceVideoError as e:
        left_out[video.name] = str(e)
  return found, left_out


def _features(
  video: TalkingVideo, features: FrameFeatures
) -> Iterator[np.ndarray]:
  for stretch in talking_video.stretches(video.has_face):
    yield features(video.frames[stretch])


def _frechet(
  generated: Sequence[np.ndarray], real: Sequence[np.ndarray], metric_name: str
) -> dict[str, Any]:
  """Returns the 'frechet' entry of scores.json.

  Raises:
    ScoreError: there are fewer than 2 features of a set.
  """
  num_generated, num_real = sum(map(len, generated)), sum(map(len, real))
  if min(num_generated, num_real) < 2:
    raise ScoreError(
      f"{metric_name} compares two sets of features, expected at least 2 of "
      f"each, found {num_generated} of the videos and {num_real} of the real "
      "ones; give more or longer videos, or leave out the real ones. All other "
      "scores are written"
    )
  a, b = np.concatenate(generated), np.concatenate(real)
  return {
    "metric": metric_name,
    "value": frechet_distance(a, b),
    "num_features": len(a),
    "num_real_features": len(b),
    "size": a.shape[1],
  }
