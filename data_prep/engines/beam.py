"""Runs shard jobs on Apache Beam: Dataflow, Flink, Spark or this machine."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Iterator, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import (
  PipelineOptions,
  StandardOptions,
)

from data_prep import storage
from data_prep.engines import pool, workers
from data_prep.output import shards
from data_prep.output.shard_job import ShardJob
from data_prep.video import video_to_records
from marlin_jax.records import folders
from marlin_jax.records.cli import UserError

# Jobs of at most some hundreds of videos: a few MB per file.
JOBS_PER_FILE = 16


# The job server of these runners knows flags that Beam's Python part does not.
_WITH_JOB_SERVER = ("FlinkRunner", "SparkRunner", "PortableRunner")


class BeamFlagError(UserError):
  """A flag of the runner is not known."""


def run(
  jobs: Sequence[ShardJob],
  settings: video_to_records.Settings,
  num_workers: int,
  flags: Sequence[str],
) -> None:
  """Runs all jobs and waits for them.

  Args:
    jobs: one per shard; every machine must see their output folder.
    settings: settings of the records.
    num_workers: videos processed at a time by each Beam worker.
    flags: flags of Beam, such as --runner=DataflowRunner.

  Raises:
    workers.WorkerError: the pipeline failed. Finished shards are kept.
    BeamFlagError: as for `options_of`.
  """
  pipeline = beam.Pipeline(options=options_of(flags))
  # The pipeline holds file names, not jobs: Dataflow accepts at most 10 MB.
  # Without the shuffle a runner may put all jobs on one machine.
  _ = (
    pipeline
    | beam.Create(_write(jobs))
    | beam.FlatMap(_read)
    | beam.Reshuffle()
    | beam.ParDo(_DoJob(settings, num_workers))
  )
  try:
    state = pipeline.run().wait_until_finish()
  except Exception as e:  # each runner has errors of its own
    if isinstance(e, UserError):
      raise
    reason = str(e).strip().partition("\n")[0]
    raise workers.WorkerError(
      f"the pipeline failed: {type(e).__name__}: {reason}"
    ) from e
  if state not in (None, "DONE"):
    raise workers.WorkerError(
      f"the pipeline ended as {state}; see its log, and run the command again"
    )


def options_of(flags: Sequence[str]) -> PipelineOptions:
  """Returns the options of Beam.

  Args:
    flags: flags of Beam; none for a local runner.

  Raises:
    BeamFlagError: Beam knows none of that name. It would be left out silently.
  """
  # Beam's default local runner downloads a program first.
  flags = [*flags] or ["--runner=FnApiRunner"]
  options = PipelineOptions(flags)
  parsers: list[argparse.ArgumentParser] = []
  known = options.get_all_options(add_extra_args_fn=parsers.append)
  _, unknown = parsers[0].parse_known_args(flags)
  runner = options.view_as(StandardOptions).runner or ""
  if unknown and runner.rpartition(".")[2] not in _WITH_JOB_SERVER:
    name = unknown[0].partition("=")[0]
    similar = difflib.get_close_matches(name.lstrip("-"), known, 1)
    raise BeamFlagError(
      f"{name} is not a flag of Apache Beam"
      + (f"; did you mean --{similar[0]}?" if similar else "")
    )
  return options


def _write(jobs: Sequence[ShardJob]) -> list[str]:
  """Writes the jobs to files beside the parts; returns the file names."""
  files = []
  for start in range(0, len(jobs), JOBS_PER_FILE):
    chunk = jobs[start : start + JOBS_PER_FILE]
    file = chunk[0].output / folders.PARTS / f"jobs-{len(files)}.jsonl"
    text = "".join(f"{job.to_json()}\n" for job in chunk)
    folders.write_bytes(file, text.encode())
    files.append(os.fspath(file))
  return files


def _read(file: str) -> Iterator[ShardJob]:
  for line in storage.path_of(file).read_bytes().splitlines():
    yield ShardJob.from_json(line)


class _DoJob(beam.DoFn):
  """Does a shard job unless its shard is written; yields the shard's name."""

  def __init__(
    self, settings: video_to_records.Settings, num_workers: int
  ) -> None:
    self._settings = settings
    self._num_workers = num_workers

  def process(self, job: ShardJob) -> Iterator[str]:
    # Runners repeat jobs, even finished ones that were not reported in time.
    if not job.is_done():
      self._do(job)
    yield job.shard

  def _do(self, job: ShardJob) -> None:
    todo = []
    for source in job.todo:
      # A part of an earlier attempt at this job counts as done.
      entry = shards.Part(job.output, source.video_id).entry()
      if entry is None:
        todo.append(source)
      else:
        job.processed[source.video_id] = entry
    for entry in pool.run(job.output, todo, self._settings, self._num_workers):
      job.processed[entry.video_id] = entry
    job.write()
