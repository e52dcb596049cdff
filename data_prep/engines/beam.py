"""The shards' jobs on Apache Beam: Dataflow, Flink, Spark or this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from data_prep import storage
from data_prep.engines import pool, workers
from data_prep.output import shards
from data_prep.output.shard_job import ShardJob
from data_prep.video import video_to_records
from marlin_jax.records import folders

# Of 32 videos each: some 3 MB.
JOBS_PER_FILE = 256


def run(
  jobs: Sequence[ShardJob],
  settings: video_to_records.Settings,
  num_workers: int,
  flags: Sequence[str],
) -> None:
  """Does all jobs; returns when they are done.

  Args:
    jobs: one per shard; their output folder must be one that every machine
      sees.
    settings: see there.
    num_workers: videos processed at a time by each of Beam's own workers.
    flags: Beam's, such as --runner=DataflowRunner.

  Raises:
    workers.WorkerError: the pipeline failed. What was done until then is kept.
  """
  # Beam's runner of this machine would first fetch a program from elsewhere.
  options = PipelineOptions([*flags] or ["--runner=FnApiRunner"])
  pipeline = beam.Pipeline(options=options)
  # Not the jobs themselves: Dataflow takes a pipeline of 10 MB at most. Without
  # the shuffle a runner may put all jobs on one machine.
  _ = (
    pipeline
    | beam.Create(_write(jobs))
    | beam.FlatMap(_read)
    | beam.Reshuffle()
    | beam.ParDo(_DoJob(settings, num_workers))
  )
  state = pipeline.run().wait_until_finish()
  if state not in (None, "DONE"):
    raise workers.WorkerError(f"the pipeline ended as {state}; run again")


def _write(jobs: Sequence[ShardJob]) -> list[str]:
  """Writes the jobs to files beside the parts; returns these."""
  files = []
  for start in range(0, len(jobs), JOBS_PER_FILE):
    some = jobs[start : start + JOBS_PER_FILE]
    file = some[0].output / folders.PARTS / f"jobs-{len(files)}.jsonl"
    text = "".join(f"{job.to_json()}\n" for job in some)
    folders.write_bytes(file, text.encode())
    files.append(os.fspath(file))
  return files


def _read(file: str) -> Iterator[ShardJob]:
  for line in storage.path_of(file).read_bytes().splitlines():
    yield ShardJob.from_json(line)


class _DoJob(beam.DoFn):
  def __init__(
    self, settings: video_to_records.Settings, num_workers: int
  ) -> None:
    self._settings = settings
    self._num_workers = num_workers

  def process(self, job: ShardJob) -> Iterator[str]:
    # Runners try again, also what was done but not told in time.
    if not job.is_done():
      self._do(job)
    yield job.shard

  def _do(self, job: ShardJob) -> None:
    todo = []
    for source in job.todo:
      # Of an earlier attempt at this job.
      entry = shards.Part(job.output, source.video_id).entry()
      if entry is None:
        todo.append(source)
      else:
        job.processed[source.video_id] = entry
    for entry in pool.run(job.output, todo, self._settings, self._num_workers):
      job.processed[entry.video_id] = entry
    job.write()
