"""How fast clips come, for each stage, against the decoding of JPEG alone.

All on one set of records, in as many threads, each stage in turns with the
limit: simplejpeg, which fills a buffer that is there already with the frames of
a batch that the pipeline made. Clips per second of one core: of the CPU time of
all threads. A table, then the path of a JSON.
"""

import argparse
import dataclasses
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent import futures
from importlib import metadata
from pathlib import Path

import grain
import jax
import numpy as np
import simplejpeg
from array_record.python.array_record_module import ArrayRecordWriter

from data_prep.output import shards
from marlin_jax.data import loader, prepared_dataset, sample
from marlin_jax.data.clip_geometry import Clip
from marlin_jax.records import schema
from tests.benchmarks import timing

LIMIT = "JPEG decoding alone"
TAKE_CLIP = loader.TakeClip(Clip(16, 2), tubelet_size=2)
SPAN = TAKE_CLIP.clip.extent
NUM_RECORDS = 256  # more bytes than caches hold
NUM_WARM = 5  # rounds until all stores and malloc's memory are filled


def cut(
  dataset: prepared_dataset.Dataset, num_frames: int, directory: str
) -> prepared_dataset.Dataset:
  """NUM_RECORDS records of `num_frames`, from the beginnings of longer ones."""
  source = prepared_dataset.RecordSource(dataset)
  long = (source[i][1] for i in range(len(source)))
  found = itertools.islice(
    (r for r in long if len(r) >= num_frames), NUM_RECORDS
  )
  contents = [
    schema.encode(
      dataclasses.replace(
        record,
        frames=list(record.frames)[:num_frames],
        regions=record.regions[:num_frames],
        boxes=record.boxes[:num_frames],
        # All frames share it; its size is what matters.
        parsing=record.parsing[
          : len(record.parsing) * num_frames // len(record)
        ],
      )
    )
    for record in found
  ]
  if not contents:
    raise SystemExit(f"no record of {dataset.path} has {num_frames} frames")
  path = Path(directory) / "faces-train.array_record-00000-of-00001"
  writer = ArrayRecordWriter(str(path), shards.WRITER_OPTIONS)
  for content in itertools.islice(itertools.cycle(contents), NUM_RECORDS):
    writer.write(content)
  writer.close()
  return dataclasses.replace(
    dataset, shards=(str(path),), num_records=NUM_RECORDS
  )


def stages(
  dataset: prepared_dataset.Dataset, batch_size: int, num_threads: int
) -> dict[str, Callable[[], Callable[[], object]]]:
  """Makers of functions that do their part for a batch in each thread."""
  raw = grain.sources.ArrayRecordDataSource(list(dataset.shards))
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])

  def batches(clips_per_record):
    return loader.train_batches(
      dataset,
      TAKE_CLIP,
      batch_size=batch_size,
      seed=0,
      start_step=0,
      num_threads=num_threads,
      clips_per_record=clips_per_record,
    )

  made = batches(1)
  several = [next(made) for _ in range(num_threads)]
  batch = {k: np.concatenate([b[k] for b in several]) for k in several[0]}
  ids, starts = batch["_id"].tolist(), batch["start"].tolist()
  encoded = [raw[i] for i in ids]
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
    """Work on each clip, every thread on a batch."""
    return lambda: list(
      pool.map(lambda share: [work(i) for i in share], shares)
    )

  # Where malloc mostly puts it. A CPU device takes what begins at a multiple of
  # 64 bytes as it is, which would be no transfer.
  shifted = np.empty(buffer.nbytes + 128, np.uint8)
  shifted = shifted[(16 - shifted.ctypes.data) % 64 :][: buffer.nbytes]
  shifted = {**batch, "video": shifted.reshape(buffer.shape)}

  def transfer():
    jax.block_until_ready(list(loader.to_devices([shifted], sharding)))

  def whole(clips_per_record):
    made = batches(clips_per_record)
    return lambda: [next(made) for _ in range(num_threads)]

  def whole_on_devices():
    made = loader.to_devices(batches(1), sharding)
    return lambda: jax.block_until_ready(
      [next(made) for _ in range(num_threads)]
    )

  apart = {
    LIMIT: all_clips(decode),
    "read": all_clips(lambda i: raw[ids[i]]),
    "parse": all_clips(lambda i: schema.decode(encoded[i])),
    "choose frames, regions": all_clips(choose),
    "new buffer": lambda: TAKE_CLIP.empty(len(ids)),
    "transfer": transfer,
  }
  return {
    **{name: lambda work=work: work for name, work in apart.items()},
    "train_batches": lambda: whole(1),
    "train_batches, to_devices": whole_on_devices,
    "2 clips per record": lambda: whole(2),
    "4 clips per record": lambda: whole(4),
  }


def measure(work: Callable[[], object], num_clips: int) -> tuple[float, float]:
  """Seconds of CPU and of wall time for each clip, once all threads rest."""
  start, cpu = time.perf_counter(), time.process_time()
  work()
  end, last, num_quiet = time.perf_counter(), time.process_time(), 0
  # What was taken from a pipeline's store is made again.
  while num_quiet < 5:
    time.sleep(0.02)
    now = time.process_time()
    if now - last > 0.002:
      end, num_quiet = time.perf_counter(), 0
    else:
      num_quiet += 1
    last = now
  return (last - cpu) / num_clips, (end - start) / num_clips


def compare(
  dataset: prepared_dataset.Dataset,
  num_frames: int,
  batch_size: int,
  num_threads: int,
  repeats: int,
) -> dict:
  """Measures and prints all stages for records of one length."""
  todo = stages(dataset, batch_size, num_threads)
  decode = todo[LIMIT]()
  rows, num_clips = {}, batch_size * num_threads
  for name, make in todo.items():
    work, limits, found = make(), [], []
    for _ in range(NUM_WARM + repeats):
      # Before and after it, as the machine's speed changes.
      limits.append(measure(decode, num_clips)[0])
      found.append(measure(work, num_clips))
    limits.append(measure(decode, num_clips)[0])
    del work  # one pipeline at a time
    limits, found = limits[NUM_WARM:], found[NUM_WARM:]
    cpu, wall = zip(*found, strict=True)
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
  return {"what": f"records of {num_frames} frames", "rows": rows}


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--path", help="a data set; without it, the sample")
  parser.add_argument(
    "--frames",
    type=int,
    nargs="+",
    default=[SPAN, 60],
    help="cut the records to so many",
  )
  parser.add_argument("--batch_size", type=int, default=32)
  parser.add_argument("--num_threads", type=int, default=2)
  parser.add_argument("--repeats", type=int, default=21)
  args = parser.parse_args()
  if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
    print("warning: without the Makefile's settings of malloc: slower")
  path = args.path or sample.prepare_sample()
  dataset = prepared_dataset.open_dataset(path, "train")
  results = []
  for num_frames in args.frames:
    with tempfile.TemporaryDirectory() as directory:
      results.append(
        compare(
          cut(dataset, num_frames, directory),
          num_frames,
          args.batch_size,
          args.num_threads,
          args.repeats,
        )
      )
  names = ("grain", "array_record", "simplejpeg", "protobuf")
  results.append(vars(args) | {name: metadata.version(name) for name in names})
  timing.save("bench_input", results)


if __name__ == "__main__":
  main()
