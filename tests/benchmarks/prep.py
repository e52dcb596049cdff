"""Measures data preparation against the limit set by decoding and the models.

On the sample video and, if it exists, the footage in ../shared/videos, in its
own size and enlarged to 720p. The unit is frames per second of CPU time, summed
over all processes and threads; all parts are measured in turns, and medians are
reported. The limit is the speed of decoding and running the models alone, each
as often as the preparation does (videos too large to keep are decoded twice,
since faces are found before they are cropped). A second limit runs each once on
every frame.

Then measures the wall time on all cores, and how far the labels agree with
those of models that run on every frame. Prints a table and the path of a JSON
file.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import av
import cv2
import numpy as np
import tqdm

from data_prep import assets
from data_prep.engines import pool
from data_prep.faces import tracking
from data_prep.regions import parsers
from data_prep.regions.mediapipe import MediaPipeParser
from data_prep.regions.track_labels import Labeller
from data_prep.sources import manifest
from data_prep.video import decode, video_to_records
from marlin_jax.records import schema
from marlin_jax.records.schema import REGIONS

SHARED = Path(__file__).parents[3] / "shared" / "videos"
SHARED_NAMES = ("video01.mp4", "video03.mp4", "cropped01.mp4")
MODELS = ("short-range detector", "full-range detector", "mesh", "segmenter")
DECODING = "decoding"
# Inputs that are kept to run a model alone.
NUM_INPUTS = 40


def sources(height: int | None, folder: Path) -> list[manifest.Source]:
  """Returns the videos, enlarged to `height` unless it is None."""
  paths = [assets.fetch_sample_videos() / "carphone_pristine.mp4"]
  paths += [SHARED / n for n in SHARED_NAMES if (SHARED / n).exists()]
  if height:
    paths = [enlarge(path, folder / path.name, height) for path in paths]
  return [manifest.Source(p.name, p, "", "train") for p in paths]


def enlarge(path: Path, target: Path, height: int) -> Path:
  """Writes a copy in 16:9, with black bars at the sides of narrower frames."""
  width = height * 16 // 9
  with av.open(str(path)) as video, av.open(str(target), "w") as out:
    stream = out.add_stream("libx264", rate=video.streams.video[0].average_rate)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    stream.options = {"crf": "20", "preset": "veryfast"}
    for frame in video.decode(video=0):
      pixels = frame.to_ndarray(format="rgb24")
      scale = min(height / pixels.shape[0], width / pixels.shape[1])
      pixels = cv2.resize(
        pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC
      )
      canvas = np.zeros((height, width, 3), np.uint8)
      x, y = (width - pixels.shape[1]) // 2, (height - pixels.shape[0]) // 2
      canvas[y:, x:][: pixels.shape[0], : pixels.shape[1]] = pixels
      out.mux(stream.encode(av.VideoFrame.from_ndarray(canvas)))
    out.mux(stream.encode())
  return target


def cpu_secs() -> float:
  """Returns the CPU time of this process and its finished children."""
  usages = (
    resource.getrusage(who)
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
  )
  return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def timed(run: Callable[[], object]) -> float:
  """Returns the CPU seconds of a call."""
  before = cpu_secs()
  run()
  return cpu_secs() - before


@contextlib.contextmanager
def watched(models: video_to_records.Models) -> Iterator[tuple[dict, dict]]:
  """Counts decoded frames and runs of each model, and keeps some inputs.

  Yields:
    Counts by name, and inputs by model: (method, image).
  """
  finder = models.finder
  tasks = [task for task, _ in finder._detectors]
  tasks += [finder._landmarker, models.parser._segmenter]
  counts, inputs = collections.Counter(), collections.defaultdict(list)
  with contextlib.ExitStack() as stack:
    for name, task in zip(MODELS, tasks, strict=True):
      method = "segment" if name == "segmenter" else "detect"
      run = getattr(task, method)

      def count(image, name=name, run=run):
        counts[name] += 1
        if len(inputs[name]) < NUM_INPUTS:
          inputs[name].append((run, image))
        return run(image)

      stack.enter_context(mock.patch.object(task, method, count))

    def read_frame(*args, run=decode.Video._read_frame):
      counts[DECODING] += 1
      return run(*args)

    stack.enter_context(
      mock.patch.object(decode.Video, "_read_frame", read_frame)
    )
    yield counts, inputs


def measure(
  videos: list[manifest.Source], models: video_to_records.Models, repeats: int
) -> dict:
  """Returns CPU milliseconds per frame, in total and by part."""

  def whole() -> int:
    return sum(
      video_to_records.process_video(
        v, video_to_records.Settings(), models, lambda _: None
      ).num_decoded_frames
      for v in videos
    )

  def decoding() -> None:
    for v in videos:
      with decode.open_video(v.path) as video:
        for _ in video:
          pass

  with watched(models) as (counts, inputs):
    num_frames = whole()
  calls = {name: count / num_frames for name, count in counts.items()}
  parts = {
    DECODING: (decoding, calls[DECODING] / num_frames),
    **{
      name: (
        lambda kept=inputs[name]: [run(image) for run, image in kept],
        calls[name] / len(inputs[name]),
      )
      for name in MODELS
    },
    "whole stage": (whole, 1 / num_frames),
  }
  millis = collections.defaultdict(list)
  for _ in tqdm.trange(repeats, desc="rounds", leave=False):
    for name, (run, share) in parts.items():
      millis[name].append(1000 * timed(run) * share)
  return {"calls_per_frame": calls, "num_frames": num_frames, **millis}


def on_all_cores(videos: list[manifest.Source], num_cores: int) -> float:
  """Returns frames per second of wall time, without starting processes."""
  copies = [
    dataclasses.replace(v, video_id=f"{i}/{v.video_id}")
    for i in range(2 * num_cores)
    for v in videos
  ]
  with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "parts").mkdir()
    entries = pool.run(
      Path(folder), copies, video_to_records.Settings(), num_cores
    )
    next(entries)
    start, num_frames = time.perf_counter(), 0
    for entry in entries:
      num_frames += entry.num_decoded_frames
  return num_frames / (time.perf_counter() - start)


def agreement(source: manifest.Source, models: video_to_records.Models) -> dict:
  """Compares labels with those of models that run on every frame."""
  with av.open(str(source.path)) as container:
    frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]

  def label(boxes: np.ndarray | None) -> tuple[np.ndarray, tracking.Track]:
    tracks = tracking.find_tracks(frames, models.finder, min_frames=1)
    track = max(tracks, key=len)
    boxes = track.boxes if boxes is None else boxes
    labeller = Labeller(models.parser, len(track))
    for i in range(len(track)):
      frame = frames[track.first_frame + i]
      labeller.add(frame, boxes[i], track.meshes[i])
    label_maps = labeller.finish()
    blank = np.full((schema.FRAME_SIZE,) * 2, 255, np.uint8)
    return np.stack([blank if m is None else m for m in label_maps]), track

  with (
    mock.patch.object(tracking, "MESH_STEPS", 1),
    mock.patch.object(MediaPipeParser, "ANALYSIS_STEPS", 1),
  ):
    slow, track = label(None)
  fast, other = label(track.boxes)
  both = (slow[:, 0, 0] < 255) & (fast[:, 0, 0] < 255)
  slow, fast = slow[both], fast[both]
  bits = [schema.region_bits(labels) for labels in (slow, fast)]
  regions = {}
  for code, name in enumerate(REGIONS[1:], 1):
    a, b = slow == code, fast == code
    same = (bits[0] >> code & 1) == (bits[1] >> code & 1)
    regions[name] = {
      "iou": float((a & b).sum() / max((a | b).sum(), 1)),
      "patches": float(same.mean()),
    }
  return {
    "video": source.video_id,
    "frames": int(both.sum()),
    "box_shift": float(np.abs(track.boxes - other.boxes).max()),
    "pixels": float((slow == fast).mean()),
    "patches": float(np.mean([r["patches"] for r in regions.values()])),
    "regions": regions,
  }


def show(title: str, measured: dict, all_cores: float, num_cores: int) -> dict:
  """Prints a table of `measure`'s result; returns it with speeds and ratios."""
  medians = {
    name: statistics.median(values)
    for name, values in measured.items()
    if isinstance(values, list)
  }
  whole = medians.pop("whole stage")
  limit = sum(medians.values())
  runs = measured["calls_per_frame"]
  every = sum(millis / runs[name] for name, millis in medians.items())
  print(f"\n{title}: {measured['num_frames']} frames")
  for name, millis in medians.items():
    spread = measured[name]
    print(
      f"  {name:22} {millis:6.2f} ms a frame ({min(spread):.2f} to "
      f"{max(spread):.2f}), {runs[name]:4.2f} runs a frame; alone "
      f"{1000 * runs[name] / millis:5.0f}/s"
    )
  print(f"  {'limit':22} {limit:6.2f} ms a frame, {1000 / limit:5.1f} frames/s")
  print(
    f"  {'whole stage':22} {whole:6.2f} ms a frame, {1000 / whole:5.1f} "
    f"frames/s per core: {limit / whole:.0%} of the limit, {every / whole:.0%} "
    "of that with all on every frame"
  )
  print(f"  {num_cores} cores, wall time: {all_cores:.1f} frames/s")
  return {
    "videos": title,
    "millis": measured,
    "limit_frames_per_sec": 1000 / limit,
    "frames_per_core_sec": 1000 / whole,
    "share_of_limit": limit / whole,
    "share_of_limit_on_every_frame": every / whole,
    "all_cores_frames_per_sec": all_cores,
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--repeats", type=int, default=5, help="rounds")
  args = parser.parse_args()
  cv2.setNumThreads(1)
  num_cores = len(os.sched_getaffinity(0))
  results = {"load_average": os.getloadavg(), "cores": num_cores}
  with (
    tempfile.TemporaryDirectory() as folder,
    video_to_records.Models(parsers.DEFAULT) as models,
  ):
    for title, height in (("their own size", None), ("720p", 720)):
      videos = sources(height, Path(folder))
      measured = measure(videos, models, args.repeats)
      speed = on_all_cores(videos, num_cores)
      results[title] = show(title, measured, speed, num_cores)
    print(
      "\nlabels against models on every frame: equal pixels and patches, IoU"
    )
    results["agreement"] = [agreement(v, models) for v in sources(None, Path())]
  for row in results["agreement"]:
    print(
      f"  {row['video']:22} pixels {row['pixels']:.2%}, patches "
      f"{row['patches']:.2%}; "
      + ", ".join(f"{n} {r['iou']:.2f}" for n, r in row["regions"].items())
    )
  path = Path("runs/bench_prep.json")
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps(results, indent=2))
  print(path)


if __name__ == "__main__":
  main()
