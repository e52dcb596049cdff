"""Results of scoring: files, a table and a chart."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from marlin_jax.lipsync import offset_chart
from marlin_jax.lipsync.scoring import face_crops, mouths, offsets
from marlin_jax.lipsync.scoring.judges import Judge
from marlin_jax.lipsync.scoring.mouths import MouthScore
from marlin_jax.lipsync.scoring.offsets import VideoScore
from marlin_jax.records import cli
from marlin_jax.records.folders import OutputFolderError, write_bytes

FILES = ("scores.json", "scores.csv", "scores.txt", "offsets.png")
# Rows of the table on screen; scores.csv has all of them.
_MAX_ROWS = 40
_MAX_CURVES = 12
_CROPS = {
  face_crops.RECORD: "face crops as in records",
  face_crops.SYNCNET: "face crops as of SyncNet's pipeline",
  face_crops.FRAME: "whole frames",
}
# Metric -> its name in papers.
_TITLES = {"lse_d": "LSE-D", "lse_c": "LSE-C", "fid": "FID"}


def results(
  scores: Sequence[VideoScore],
  left_out: Mapping[str, str],
  judge: Judge,
  *,
  max_offset: int,
  crop: str,
) -> dict[str, Any]:
  """Returns the content of scores.json.

  Args:
    scores: scores of the videos, at least one.
    left_out: name of a video -> reason why it has no score.
    judge: gives the names of the metrics.
    max_offset: largest offset of the curves in frames, K.
    crop: face crop that was judged, see `face_crops`.

  Returns:
    A dict, fit for JSON: `judge`; `metrics`, the keys of the two metrics;
    `max_offset`; `crop`; `mean`, both metrics averaged over the videos;
    `share_in_sync`, the fraction of videos whose offset is at most 1 frame;
    `offsets`, the axis of the curves; `curve`, the distance at each offset,
    averaged over the videos; `videos`, a list with the metrics and the curve of
    each; `left_out`. `add_mouths` adds to them.
  """
  distance, confidence = judge.metric_names
  videos = [
    {
      "video": score.name,
      "offset": score.sync.offset,
      distance: score.sync.distance,
      confidence: score.sync.confidence,
      "num_windows": score.sync.num_windows,
      "num_frames": score.num_frames,
      "num_faceless": score.num_faceless,
      "num_unheard": score.num_unheard,
      "curve": score.sync.curve.tolist(),
    }
    for score in scores
  ]
  return {
    "judge": judge.name,
    "metrics": [distance, confidence],
    "max_offset": max_offset,
    "crop": crop,
    "mean": {
      name: statistics.fmean(video[name] for video in videos)
      for name in judge.metric_names
    },
    "share_in_sync": statistics.fmean(
      abs(video["offset"]) <= 1 for video in videos
    ),
    "offsets": offsets.offset_axis(max_offset).tolist(),
    "curve": [
      statistics.fmean(distances)
      for distances in zip(*(video["curve"] for video in videos), strict=True)
    ],
    "videos": videos,
    "left_out": dict(left_out),
  }


def add_mouths(
  results: dict[str, Any],
  found: Mapping[str, MouthScore],
  left_out: Mapping[str, str],
) -> None:
  """Adds the scores of mouths to those of `results`.

  Args:
    results: from `results`; each video gets the metrics of `mouths.METRICS`,
      None without a score or where it is NaN, and `mean` their means over the
      videos that have one.
    found: scores by name of the video.
    left_out: name of a video -> reason why it has none.
  """
  results["metrics"] += mouths.METRICS
  results["mouths_left_out"] = dict(left_out)
  for metric in mouths.METRICS:
    values = {name: getattr(score, metric) for name, score in found.items()}
    values = {k: value for k, value in values.items() if not np.isnan(value)}
    for video in results["videos"]:
      video[metric] = values.get(video["video"])
    mean = statistics.fmean(values.values()) if values else None
    results["mean"][metric] = mean


def check_folder(folder: Path) -> None:
  """Raises OutputFolderError if `write` would replace files of others."""
  try:
    scores = json.loads((folder / "scores.json").read_bytes())
    is_own = isinstance(scores, dict) and "judge" in scores
  except FileNotFoundError:
    is_own = not any((folder / name).exists() for name in FILES)
  except ValueError:
    is_own = False
  if not is_own:
    raise OutputFolderError(
      f"{folder} holds {' or '.join(FILES)}, but not of an earlier score; "
      "choose another --output"
    )


def write(folder: Path, results: Mapping[str, Any]) -> None:
  """Writes scores.json, scores.csv, scores.txt and offsets.png.

  Args:
    folder: created if missing.
    results: the content of scores.json.
  """
  folder.mkdir(parents=True, exist_ok=True)
  write_bytes(
    folder / "scores.json", (json.dumps(results, indent=1) + "\n").encode()
  )
  rows = [
    {key: value for key, value in video.items() if key != "curve"}
    for video in results["videos"]
  ]
  text = io.StringIO()
  writer = csv.DictWriter(text, rows[0], lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  write_bytes(folder / "scores.csv", text.getvalue().encode())
  write_bytes(folder / "scores.txt", (table(results) + "\n").encode())
  png = io.BytesIO()
  Image.fromarray(_chart(results)).save(png, "png")
  write_bytes(folder / "offsets.png", png.getvalue())


def table(results: Mapping[str, Any]) -> str:
  """Returns the results as text, at most 40 videos.

  Args:
    results: the content of scores.json.
  """
  metrics = results["metrics"]
  rows = [["video", "offset", *map(_title, metrics), "windows"]]
  rows += [
    [
      video["video"],
      f"{video['offset']:+d}",
      *(_number(video[name]) for name in metrics),
      str(video["num_windows"]),
    ]
    for video in results["videos"][:_MAX_ROWS]
  ]
  rows.append(
    ["mean", "", *(_number(results["mean"][name]) for name in metrics), ""]
  )
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  padded = [map(str.ljust, row, widths) for row in rows]
  lines = ["  ".join(row).rstrip() for row in padded]
  num_videos = len(results["videos"])
  if num_videos > _MAX_ROWS:
    lines.insert(-1, f"and {num_videos - _MAX_ROWS} more, in scores.csv")
  lines.append(
    f"{results['share_in_sync']:.0%} of {cli.counted(num_videos, 'video')} are "
    f"within a frame of sync, by {results['judge']} on "
    f"{_CROPS[results['crop']]}"
  )
  if frechet := results.get("frechet"):
    num_features = frechet["num_features"], frechet["num_real_features"]
    lines.append(
      f"{_title(frechet['metric'])} {frechet['value']:.4g}, of "
      f"{num_features[0]} and {num_features[1]} features "
      f"of {frechet['size']} numbers"
    )
    if min(num_features) < frechet["size"]:
      lines.append("  (fewer features than numbers: it comes out too high)")
  if left_out := results["left_out"]:
    lines.append(f"left out: {cli.counted(len(left_out), 'video')}")
    lines += cli.reasons(left_out)
  if left_out := results.get("mouths_left_out"):
    lines.append(f"mouths not compared: {cli.counted(len(left_out), 'video')}")
    lines += cli.reasons(left_out)
  return "\n".join(lines)


def _number(value: float | None) -> str:
  return "-" if value is None else f"{value:.3f}"


def _title(metric: str) -> str:
  return _TITLES.get(metric, metric)


def _chart(results: Mapping[str, Any]) -> np.ndarray:
  """Draws the mean distance over offsets: of all videos, and of each of 12."""
  curves = {"all videos": results["curve"]}
  curves |= {
    video["video"]: video["curve"] for video in results["videos"][:_MAX_CURVES]
  }
  return offset_chart.draw(
    # Reversed: the chart's offsets are ascending.
    np.array(results["offsets"])[::-1],
    {name: np.array(curve)[::-1] for name, curve in curves.items()},
    f"Mean distance by {results['judge']}",
    x_label="offset in frames (above 0: the sound is too early)",
    mark_lowest=True,
  )
