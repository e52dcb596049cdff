"""How fast videos become records, against what decoding and models allow.

On the sample video and, where it is there, the footage in ../shared/videos, as
it is and enlarged to 720p. Frames per second of one core: of the CPU time of
all processes and threads. Each part in turns with the others; medians. The
limit is what a stage would reach that only decodes and runs its models, each as
often as the stage does (what is too large to keep is decoded twice: faces are
found before they are cut); beside it, if each ran once on every frame.

Then the whole stage on all cores, by the clock; and how far the labels agree
with those of models that run on every frame. A table, then the path of a JSON.
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
# Inputs of a model that are kept, to run it alone.
NUM_INPUTS = 40


def sources(height: int | None, folder: Path) -> list[manifest.Source]:
  """The videos, enlarged to a height where one is given."""
  paths = [assets.fetch_sample_videos() / "carphone_pristine.mp4"]
  paths += [SHARED / n for n in SHARED_NAMES if (SHARED / n).exists()]
  if height:
    paths = [enlarge(path, folder / path.name, height) for path in paths]
  return [manifest.Source(p.name, p, "", "train") for p in paths]


def enlarge(path: Path, target: Path, height: int) -> Path:
  """Writes a copy of 16:9, with bars where the picture is narrower."""
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
  """Of this process and of those that it has waited for."""
  found = (
    resource.getrusage(who)
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
  )
  return sum(usage.ru_utime + usage.ru_stime for usage in found)


def timed(run: Callable[[], object]) -> float:
  before = cpu_secs()
  run()
  return cpu_secs() - before


@contextlib.contextmanager
def watched(models: video_to_records.Models) -> Iterator[tuple[dict, dict]]:
  """Counts frames decoded and runs of each model, and keeps some inputs."""
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
  """CPU milliseconds per frame of the whole stage and of its parts."""

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
  """Frames per second by the clock, without the start of the processes."""
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
  """How far labels are those of all models on every frame."""
  with av.open(str(source.path)) as container:
    frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]

  def label(boxes: np.ndarray | None) -> tuple[np.ndarray, tracking.Track]:
    tracks = tracking.find_tracks(frames, models.finder, min_frames=1)
    track = max(tracks, key=len)
    boxes = track.boxes if boxes is None else boxes
    labeller = Labeller(models.parser, len(track))
    for i in range(len(track)):
      frame = frames[track.first_frame + i]
      labeller.add(frame, boxes[i], track.landmarks[i])
    found = labeller.finish()
    blank = np.full((schema.FRAME_SIZE,) * 2, 255, np.uint8)
    return np.stack([blank if f is None else f for f in found]), track

  with (
    mock.patch.object(tracking, "MESH_STEPS", 1),
    mock.patch.object(MediaPipeParser, "LOOK_STEPS", 1),
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


def show(title: str, found: dict, all_cores: float, num_cores: int) -> dict:
  """Prints a table; returns it with what follows from it."""
  medians = {
    name: statistics.median(values)
    for name, values in found.items()
    if isinstance(values, list)
  }
  whole = medians.pop("whole stage")
  limit = sum(medians.values())
  runs = found["calls_per_frame"]
  every = sum(millis / runs[name] for name, millis in medians.items())
  print(f"\n{title}: {found['num_frames']} frames")
  for name, millis in medians.items():
    spread = found[name]
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
  print(f"  {num_cores} cores, by the clock: {all_cores:.1f} frames/s")
  return {
    "videos": title,
    "millis": found,
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
      found = measure(videos, models, args.repeats)
      speed = on_all_cores(videos, num_cores)
      results[title] = show(title, found, speed, num_cores)
    print("\nlabels, against all models on every frame: IoU, and patches alike")
    results["agreement"] = [agreement(v, models) for v in sources(None, Path())]
  for found in results["agreement"]:
    print(
      f"  {found['video']:22} pixels {found['pixels']:.2%}, patches "
      f"{found['patches']:.2%}; "
      + ", ".join(f"{n} {r['iou']:.2f}" for n, r in found["regions"].items())
    )
  path = Path("runs/bench_prep.json")
  path.parent.mkdir(exist_ok=True)
  path.write_text(json.dumps(results, indent=2))
  print(path)


if __name__ == "__main__":
  main()
