"""What scoring tells: files, a table and a picture."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from marlin_jax.lipsync import offset_chart
from marlin_jax.lipsync.scoring import offsets
from marlin_jax.records import cli
from marlin_jax.records.folders import write_bytes

if TYPE_CHECKING:
  from marlin_jax.lipsync.scoring.judges import Judge
  from marlin_jax.lipsync.scoring.score import VideoScore

# Rows of the table on screen; all are in scores.csv.
_MAX_ROWS = 40
_MAX_CURVES = 12


def results(
  scored: Sequence[VideoScore],
  left_out: Mapping[str, str],
  judge: Judge,
  *,
  max_offset: int,
  crop_face: bool,
) -> dict[str, Any]:
  """Puts everything together, fit for JSON.

  Returns:
    `judge`, `metrics`, the names of the two numbers below; `max_offset`,
    `crop_face`; `mean` of the videos, of both; `share_in_sync`, of the videos
    whose offset is at most 1 frame; `offsets`, those that `curve` is over;
    `curve`, the mean distance at each, over all videos; `videos`, a dict of
    each with its own numbers and curve; `left_out`, reasons by name.
  """
  distance, confidence = judge.metric_names
  videos = [
    {
      "video": one.name,
      "offset": one.sync.offset,
      distance: one.sync.distance,
      confidence: one.sync.confidence,
      "num_windows": one.sync.num_windows,
      "num_frames": one.num_frames,
      "num_faceless": one.num_faceless,
      "num_unheard": one.num_unheard,
      "curve": one.sync.curve.tolist(),
    }
    for one in scored
  ]
  return {
    "judge": judge.name,
    "metrics": [distance, confidence],
    "max_offset": max_offset,
    "crop_face": crop_face,
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


def write(folder: Path, found: dict[str, Any]) -> None:
  """Writes scores.json, .csv and .txt, and offsets.png."""
  folder.mkdir(parents=True, exist_ok=True)
  write_bytes(
    folder / "scores.json", (json.dumps(found, indent=1) + "\n").encode()
  )
  rows = [
    {key: value for key, value in video.items() if key != "curve"}
    for video in found["videos"]
  ]
  text = io.StringIO()
  writer = csv.DictWriter(text, rows[0], lineterminator="\n")
  writer.writeheader()
  writer.writerows(rows)
  write_bytes(folder / "scores.csv", text.getvalue().encode())
  write_bytes(folder / "scores.txt", (table(found) + "\n").encode())
  _plot(folder / "offsets.png", found)


def table(found: dict[str, Any]) -> str:
  """The scores for people."""
  names = [_title(name) for name in found["metrics"]]
  rows = [["video", "offset", *names, "windows"]]
  for video in found["videos"][:_MAX_ROWS]:
    numbers = [f"{video[name]:.3f}" for name in found["metrics"]]
    rows.append(
      [video["video"], f"{video['offset']:+d}", *numbers]
      + [str(video["num_windows"])]
    )
  means = [f"{found['mean'][name]:.3f}" for name in found["metrics"]]
  rows.append(["mean", "", *means, ""])
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  padded = [map(str.ljust, row, widths) for row in rows]
  lines = ["  ".join(row).rstrip() for row in padded]
  num = len(found["videos"])
  if num > _MAX_ROWS:
    lines.insert(-1, f"and {num - _MAX_ROWS} more, in scores.csv")
  lines.append(
    f"{found['share_in_sync']:.0%} of {cli.counted(num, 'video')} are "
    f"within a frame of sync, by {found['judge']}"
  )
  if frechet := found.get("frechet"):
    lines.append(
      f"{_title(frechet['metric'])} {frechet['value']:.4g}, of "
      f"{frechet['num_features']} and {frechet['num_real_features']} features "
      f"of {frechet['size']} numbers"
    )
    if (
      min(frechet["num_features"], frechet["num_real_features"])
      < (frechet["size"])
    ):
      lines.append("  (fewer features than numbers: it comes out too high)")
  if left_out := found["left_out"]:
    lines.append(f"left out: {cli.counted(len(left_out), 'video')}")
    lines += cli.reasons(left_out)
  return "\n".join(lines)


def _title(metric: str) -> str:
  """As papers write it, where they do."""
  return {"lse_d": "LSE-D", "lse_c": "LSE-C", "fid": "FID"}.get(metric, metric)


def _plot(path: Path, found: dict[str, Any]) -> None:
  """Draws the mean distance over offsets, of all videos and of each."""
  curves = {"all videos": found["curve"]}
  curves |= {
    video["video"]: video["curve"] for video in found["videos"][:_MAX_CURVES]
  }
  chart = offset_chart.draw(
    # Ascending.
    np.array(found["offsets"])[::-1],
    {name: np.array(curve)[::-1] for name, curve in curves.items()},
    f"Mean distance by {found['judge']}",
    x_label="offset in frames (above 0: the sound is too early)",
    mark_lowest=True,
  )
  content = io.BytesIO()
  Image.fromarray(chart).save(content, "png")
  write_bytes(path, content.getvalue())
