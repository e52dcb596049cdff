"""Measures the stages of the input pipeline against JPEG decoding alone.

All stages use the same records and number of threads, in turns with the limit:
simplejpeg decodes the frames of a batch into a buffer that exists already. The
unit is clips per second of CPU time, summed over all threads and worker
processes. Then threads and worker processes serve clips whose decoding takes
2.5 ms and no CPU, as with endless cores: what limits them is the rest of the
work, and in threads Python's lock. Prints tables and the path of a JSON file.
"""

import argparse
import dataclasses
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent import futures
from importlib import metadata
from pathlib import Path

import cv2
import jax
import numpy as np
import simplejpeg
from array_record.python.array_record_module import ArrayRecordWriter

from data_prep.output import shards
from data_prep.video import video_to_records
from marlin_jax.data import loader, prepared_dataset, sample, sampling
from marlin_jax.data.clip_geometry import Clip
from marlin_jax.data.clips import TakeClip
from marlin_jax.records import schema
from tests.benchmarks import timing

LIMIT = "JPEG decoding alone"
TAKE_CLIP = TakeClip(Clip(16, 2), tubelet_size=2)
SPAN = TAKE_CLIP.clip.extent
NUM_RECORDS = 256  # more bytes than fit in caches
NUM_WARM = 5  # rounds until all queues and malloc's memory are filled


def cut(
  dataset: prepared_dataset.Dataset,
  num_frames: int,
  directory: str,
  frame_size: int = schema.FRAME_SIZE,
) -> prepared_dataset.Dataset:
  """Returns a data set of NUM_RECORDS records with `num_frames` each.

  They are the beginnings of records that are at least as long.

  Args:
    dataset: the source.
    num_frames: frames per record.
    directory: where the new shard is written.
    frame_size: size to which frames are scaled down, as `prepare --frame_size`
      does.
  """
  source = prepared_dataset.RecordSource(dataset)
  records = (source[i][1] for i in range(len(source)))
  long_enough = itertools.islice(
    (r for r in records if len(r) >= num_frames), NUM_RECORDS
  )
  contents = [
    schema.encode(
      dataclasses.replace(
        record,
        frames=scaled(list(record.frames)[:num_frames], frame_size),
        regions=record.regions[:num_frames],
        boxes=record.boxes[:num_frames],
        # Truncated: it is not decoded here, only its size matters.
        parsing=record.parsing[
          : len(record.parsing) * num_frames // len(record)
        ],
      )
    )
    for record in long_enough
  ]
  if not contents:
    raise SystemExit(f"no record of {dataset.path} has {num_frames} frames")
  path = Path(directory) / f"{frame_size}-train.array_record-00000-of-00001"
  writer = ArrayRecordWriter(str(path), shards.WRITER_OPTIONS)
  for content in itertools.islice(itertools.cycle(contents), NUM_RECORDS):
    writer.write(content)
  writer.close()
  return dataclasses.replace(
    dataset,
    shards=(str(path),),
    lengths=(NUM_RECORDS,),
    num_records=NUM_RECORDS,
    frame_size=frame_size,
  )


def scaled(frames: list[bytes], frame_size: int) -> list[bytes]:
  if frame_size == schema.FRAME_SIZE:
    return frames
  size = (frame_size, frame_size)
  return [
    simplejpeg.encode_jpeg(
      cv2.resize(
        simplejpeg.decode_jpeg(frame), size, interpolation=cv2.INTER_AREA
      ),
      quality=video_to_records.JPEG_QUALITY,
      colorsubsampling="420",
    )
    for frame in frames
  ]


def stages(
  dataset: prepared_dataset.Dataset,
  small: prepared_dataset.Dataset,
  batch_size: int,
  num_threads: int,
) -> dict[str, Callable[[], Callable[[], object]]]:
  """Returns functions that set up a stage, by name.

  `small` is the data set with frames of 112 pixels.

  Each returns a function that does the work of its stage for one batch per
  thread.
  """
  raw = dataset.source
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

  def batches(
    clips_per_record=1, take_clip=TAKE_CLIP, dataset=dataset, **reading
  ):
    return loader.train_batches(
      sampling.RecordDraws(dataset, seed=0, num_clips=clips_per_record),
      take_clip,
      batch_size=batch_size,
      start_step=0,
      **{"num_threads": num_threads} | reading,
    )

  made = batches()
  several = [next(made) for _ in range(num_threads)]
  batch = {k: np.concatenate([b[k] for b in several]) for k in several[0]}
  ids, starts = batch["_id"].tolist(), batch["start"].tolist()
  encoded = [raw.read(i) for i in ids]
  parsed = [schema.decode(data) for data in encoded]
  frames = [
    [r.frames[i] for i in TAKE_CLIP.clip.indices(start, len(r))]
    for r, start in zip(parsed, starts, strict=True)
  ]
  buffer = np.zeros_like(batch["video"])

  def decode(i):
    for frame, place in zip(frames[i], buffer[i], strict=True):
      simplejpeg.decode_jpeg(frame, buffer=place)

  def choose(i):
    part = {key: x[i : i + 1] for key, x in batch.items()}
    np_rng = np.random.default_rng((0, i))
    TAKE_CLIP.choose(part, ids[i], parsed[i], np_rng)

  pool = futures.ThreadPoolExecutor(num_threads)
  shares = np.split(np.arange(len(ids)), num_threads)

  def all_clips(work):
    """Applies `work` to each clip; each thread has the clips of a batch."""
    return lambda: list(
      pool.map(lambda share: [work(i) for i in share], shares)
    )

  # At an address as malloc mostly returns. A CPU device uses buffers aligned to
  # 64 bytes in place, which would be no transfer.
  shifted = np.empty(buffer.nbytes + 128, np.uint8)
  shifted = shifted[(16 - shifted.ctypes.data) % 64 :][: buffer.nbytes]
  shifted = {**batch, "video": shifted.reshape(buffer.shape)}

  def transfer():
    jax.block_until_ready(list(loader.to_devices([shifted], sharding)))

  def whole(*args, **options):
    made = batches(*args, **options)
    return lambda: [next(made) for _ in range(num_threads)]

  def whole_on_devices():
    made = loader.to_devices(batches(), sharding)
    return lambda: jax.block_until_ready(
      [next(made) for _ in range(num_threads)]
    )

  take_small = dataclasses.replace(TAKE_CLIP, frame_size=112)
  apart = {
    LIMIT: all_clips(decode),
    "read": all_clips(lambda i: raw.read(ids[i])),
    "parse": all_clips(lambda i: schema.decode(encoded[i])),
    "choose frames, regions": all_clips(choose),
    "new buffer": lambda: TAKE_CLIP.empty(len(ids)),
    "transfer": transfer,
  }
  return {
    **{name: lambda work=work: work for name, work in apart.items()},
    "train_batches": whole,
    "train_batches, to_devices": whole_on_devices,
    "worker processes": lambda: whole(num_threads=1, num_workers=num_threads),
    "112 of 224 pixels": lambda: whole(take_clip=take_small),
    "112 of 112 pixels": lambda: whole(take_clip=take_small, dataset=small),
    "2 clips per record": lambda: whole(2),
    "4 clips per record": lambda: whole(4),
  }


def cpu_secs() -> float:
  """Returns the CPU time of this process and its worker processes."""
  secs = time.process_time()
  for worker in multiprocessing.active_children():
    threads = f"/proc/{worker.pid}/task"
    for thread in os.listdir(threads):
      with open(f"{threads}/{thread}/schedstat") as file:
        secs += int(file.read().split()[0]) / 1e9
  return secs


def measure(work: Callable[[], object], num_clips: int) -> tuple[float, float]:
  """Returns CPU and wall seconds per clip, once all threads are idle again."""
  start, cpu = time.perf_counter(), cpu_secs()
  work()
  end, last, num_quiet = time.perf_counter(), cpu_secs(), 0
  # The pipeline refills the queue that `work` has taken batches from.
  while num_quiet < 5:
    time.sleep(0.02)
    now = cpu_secs()
    if now - last > 0.004:  # more than this loop takes
      end, num_quiet = time.perf_counter(), 0
    else:
      num_quiet += 1
    last = now
  return (last - cpu) / num_clips, (end - start) / num_clips


def compare(
  dataset: prepared_dataset.Dataset,
  small: prepared_dataset.Dataset,
  num_frames: int,
  batch_size: int,
  num_threads: int,
  repeats: int,
) -> dict:
  """Measures all stages for records of one length; prints and returns them."""
  stage_makers = stages(dataset, small, batch_size, num_threads)
  decode = stage_makers[LIMIT]()
  rows, num_clips = {}, batch_size * num_threads
  for name, make in stage_makers.items():
    work, limits, timings = make(), [], []
    for _ in range(NUM_WARM + repeats):
      # Before and after it, since the speed of the machine varies.
      limits.append(measure(decode, num_clips)[0])
      timings.append(measure(work, num_clips))
    limits.append(measure(decode, num_clips)[0])
    del work  # one pipeline at a time
    limits, timings = limits[NUM_WARM:], timings[NUM_WARM:]
    cpu, wall = zip(*timings, strict=True)
    median = statistics.median(cpu)
    around = map(statistics.mean, itertools.pairwise(limits))
    shares = [a / b for a, b in zip(around, cpu, strict=True)]
    share = statistics.median(shares)
    rows[name] = {
      "clips_per_cpu_sec": 1 / median,
      "over_limit": share,
      "cpu_secs": cpu,
      "limit_cpu_secs": limits,
      "wall_secs": wall,
    }
    print(
      f"{num_frames} frames  {name:25} {1 / median:6.0f} clips/s of a core  "
      f"{1e3 * median:6.3f} ms ({1e3 * min(cpu):.3f} to {1e3 * max(cpu):.3f})"
      f", wall {1e3 * statistics.median(wall):6.3f} ms  {share:5.2f} x the "
      f"limit ({min(shares):.2f} to {max(shares):.2f})",
      flush=True,
    )
  ratios = in_turns(
    stage_makers["train_batches"](),
    stage_makers["112 of 112 pixels"](),
    num_clips,
    repeats,
  )
  low, median, high = statistics.quantiles(ratios, n=4)
  print(
    f"{num_frames} frames  in turns, {median:.2f} clips of 112 pixels in the "
    f"time of one of 224 (quartiles {low:.2f} and {high:.2f})",
    flush=True,
  )
  return {
    "what": f"records of {num_frames} frames",
    "rows": rows,
    "clips_of_112_per_clip_of_224": ratios,
  }


def in_turns(
  work: Callable[[], object],
  other: Callable[[], object],
  num_clips: int,
  repeats: int,
) -> list[float]:
  """Returns ratios of the CPU time of `work` to that of `other`, in turns."""
  ratios = []
  before = measure(work, num_clips)[0]
  for _ in range(NUM_WARM + repeats):
    between = measure(other, num_clips)[0]
    after = measure(work, num_clips)[0]
    ratios.append((before + after) / 2 / between)
    before = after
  return ratios[NUM_WARM:]


class EndlessCores(TakeClip):
  """Decodes in 2.5 ms, without a core."""

  def decode(self, clips, index, record, frames):
    time.sleep(0.0025)


def without_decoding(
  dataset: prepared_dataset.Dataset, batch_size: int, secs: float
) -> dict:
  """Measures clips per second of wall time; prints and returns them."""
  rows = {}
  for reading in (
    loader.Reading(num_threads=32),
    loader.Reading(num_threads=16, num_workers=2),
  ):
    made = loader.train_batches(
      sampling.RecordDraws(dataset, seed=0),
      EndlessCores(TAKE_CLIP.clip, TAKE_CLIP.tubelet_size),
      batch_size=batch_size,
      start_step=0,
      **reading._asdict(),
    )
    for _ in range(20):
      next(made)
    start, cpu, num_clips = time.perf_counter(), cpu_secs(), 0
    while (wall := time.perf_counter() - start) < secs:
      next(made)
      num_clips += batch_size
    cpu = cpu_secs() - cpu
    rows[str(reading)] = {
      "clips_per_sec": num_clips / wall,
      "cpu_secs_per_clip": cpu / num_clips,
      "cores_used": cpu / wall,
      "load": os.getloadavg()[0],
    }
    print(
      f"no decoding  {reading!s:40} {num_clips / wall:6.0f} clips/s, "
      f"{1e3 * cpu / num_clips:.3f} ms of CPU each, {cpu / wall:.2f} cores, "
      f"load {os.getloadavg()[0]:.1f}",
      flush=True,
    )
    del made
  return {"what": "without decoding", "rows": rows}


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--path", help="a data set; default: the sample")
  parser.add_argument(
    "--frames",
    type=int,
    nargs="+",
    default=[SPAN, 60],
    help="frames per record",
  )
  parser.add_argument("--batch_size", type=int, default=32)
  parser.add_argument("--num_threads", type=int, default=2)
  parser.add_argument("--repeats", type=int, default=21)
  parser.add_argument(
    "--secs", type=float, default=5, help="time of each row without decoding"
  )
  args = parser.parse_args()
  if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
    print("warning: slower without the malloc settings of the Makefile")
  path = args.path or sample.prepare_sample()
  dataset = prepared_dataset.open_dataset(path, "train")
  results = []
  for num_frames in args.frames:
    with tempfile.TemporaryDirectory() as directory:
      results.append(
        compare(
          cut(dataset, num_frames, directory),
          cut(dataset, num_frames, directory, 112),
          num_frames,
          args.batch_size,
          args.num_threads,
          args.repeats,
        )
      )
  with tempfile.TemporaryDirectory() as directory:
    made = cut(dataset, args.frames[0], directory)
    results.append(without_decoding(made, args.batch_size, args.secs))
  names = ("array_record", "simplejpeg", "protobuf")
  results.append(vars(args) | {name: metadata.version(name) for name in names})
  timing.save("bench_input", results)


if __name__ == "__main__":
  main()
