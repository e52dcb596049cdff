"""Pretraining, as a course of the training loop (training/loop.py)."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from marlin_jax.data import (
  prepared_dataset,
  sample,
  sampling,
  segment_indexing,
)
from marlin_jax.data.clip_geometry import Clip
from marlin_jax.data.prepared_dataset import Dataset
from marlin_jax.data.sampling import Draws
from marlin_jax.devices import chips, distributed, sharding
from marlin_jax.pretraining import configuration, flops, warm_start
from marlin_jax.pretraining.build import Experiment, count
from marlin_jax.pretraining.train_step import Trainer, TrainState
from marlin_jax.records import cli
from marlin_jax.records.segment_index import SegmentIndex
from marlin_jax.training.configuration import check_attention
from marlin_jax.training.course import Stage, work


class TrainingData:
  """A data set that a run is trained on.

  Attributes:
    path: its folder.
    name: names its metrics.
    weight: weight of its share of the clips.
    dataset: training split.
    index: segments of the training split; None with data.sample_by=record.
  """

  dataset: Dataset
  index: SegmentIndex | None

  def __init__(
    self, data: configuration.DataSet, settings: ConfigDict, cache: epath.Path
  ):
    """Opens nothing yet.

    Args:
      data: path, weight and name.
      settings: the section `data` of the configuration.
      cache: folder for an index that the data set lacks, and for the records
        of `min_quality`.
    """
    self.path, self.weight, self.name = data
    self._settings, self._cache = settings, cache

  def open(self, alive: Callable[..., None]) -> Self:
    """Opens the training split; called by all processes together.

    Args:
      alive: `Watchdog.alive`.

    Raises:
      DatasetError: there is no such data set or split, or it is damaged.
    """
    settings = self._settings
    if self.path == "sample":
      _note(cli.as_started(sample.NOTICE))
      alive("preparing the sample", is_limited=False)
      with distributed.process_0_first():
        self.path = sample.prepare_sample()
    alive("opening the data", is_limited=not settings.min_quality)
    with distributed.process_0_first():
      self.dataset = prepared_dataset.open_dataset(
        self.path, settings.split, settings.min_quality, self._cache
      )
    self.index = None
    if settings.sample_by != "record":
      alive("indexing the segments", is_limited=False)
      with distributed.process_0_first():
        self.index = segment_indexing.open_index(self.dataset, self._cache)
    return self


def evaluated_splits(
  parts: Sequence[TrainingData], settings: ConfigDict
) -> list[Dataset]:
  """Opens the splits that a run is evaluated on.

  They are of the data sets that have such a split, and without the quality
  threshold, so that runs with different thresholds evaluate the same clips.

  Args:
    parts: training data, open.
    settings: the section `data` of the configuration.

  Returns:
    The split `data.eval_split`, or `val`, of each data set that has it; where
    none has `val`, what is trained on.

  Raises:
    DatasetError: no data set has `data.eval_split`.
  """
  name = settings.eval_split or "val"
  chosen = [x for x in parts if prepared_dataset.has_split(x.path, name)]
  if chosen:
    for part in parts:
      if part not in chosen:
        _note(
          f"note: {part.path} has no split '{name}', so it is not evaluated"
        )
  elif not settings.eval_split:
    _note(
      f"note: {' and '.join(part.path for part in parts)}: no split '{name}': "
      f"evaluated on '{settings.split}', which is trained on; prepare with "
      "--val_ratio, or set config.data.eval_split"
    )
    name = settings.split
  return [
    prepared_dataset.open_dataset(part.path, name) for part in chosen or parts
  ]


def _note(text: str) -> None:
  if jax.process_index() == 0:
    print(text, flush=True)


class PretrainingCourse(Experiment):
  """An experiment on data sets; a `training.course.Course`.

  Attributes:
    parts: training data.

  The other attributes are those of `Experiment`.
  """

  def __init__(
    self,
    config: ConfigDict,
    parts: Sequence[TrainingData],
  ):
    """Arranges the devices; builds nothing else yet.

    Args:
      config: a valid configuration; see configs/pretrain_b.py.
      parts: training data, open: one data set, or several with weights.

    Raises:
      MeshError: the configuration does not fit the number of devices.
      ConfigError: the attention does not run there, or the stages of the
        curriculum are longer than the run.
      UserError: an objective cannot be trained on the data.
    """
    # The smallest of all processes, so that they split a batch alike.
    device_bytes = distributed.smallest(
      chips.device_bytes(jax.local_devices()[0])
    )
    super().__init__(config, config.num_steps, device_bytes=device_bytes)
    sharding.check_batch(self.mesh, self.batch_size)
    platform = self.mesh.devices.flat[0].platform
    check_attention(config.attention, platform, config.dtype)
    self.parts = parts
    clips_per_epoch = self.draws.clips_per_epoch
    datasets = [part.dataset for part in parts]
    for x in self.objectives:
      x.check_data(datasets, clips_per_epoch)
    self.num_steps = self.steps_of(config.num_steps, config.num_epochs)
    configuration.check_curriculum(config, self.num_steps)

  def steps_of(self, num_steps: int, num_epochs: float) -> int:
    """Returns the steps of a run of `num_steps`, or else of `num_epochs`."""
    num_clips = num_epochs * self.draws.clips_per_epoch
    return num_steps or math.ceil(num_clips / self.batch_size)

  @functools.cached_property
  def mesh(self) -> Mesh:
    """All devices, as the configuration arranges them."""
    return sharding.make_mesh(**self.config.mesh)

  @functools.cached_property
  def draws(self) -> Draws:
    """Clips of the training data by their place in the run."""
    return self._draws(self.take_clip.longest_clip)

  def _draws(self, clip: Clip) -> Draws:
    """Returns the draws of clips of a length, in the same order for any."""
    seed = self.config.seed
    if len(self.parts) == 1:
      return self._draws_of(self.parts[0], clip, seed)
    return sampling.MixedDraws(
      [
        self._draws_of(part, clip, sampling.part_seed(seed, i))
        for i, part in enumerate(self.parts)
      ],
      [part.weight for part in self.parts],
      seed,
      self.config.data.draws_per_unit,
    )

  def _draws_of(self, part: TrainingData, clip: Clip, seed: int) -> Draws:
    settings = self.config.data
    order = sampling.ORDERS[settings.order]
    if settings.shuffle_window:
      order = functools.partial(order, window=settings.shuffle_window)
    options = {
      "order": order,
      "num_clips": settings.clips_per_record,
    }
    if settings.sample_by == "record":
      return sampling.RecordDraws(part.dataset, seed, **options)
    return sampling.VideoDraws(
      part.dataset,
      part.index,
      clip,
      seed,
      by_subject=settings.sample_by == "subject",
      draws_per_unit=settings.draws_per_unit,
      **options,
    )

  @functools.cached_property
  def trainer(self) -> Trainer:
    """Static half of the training step, with the data sets' names."""
    trainer = super().trainer
    if len(self.parts) == 1:
      return trainer
    return dataclasses.replace(
      trainer,
      datasets=tuple(part.name for part in self.parts),
      first_ids=tuple(sampling.first_ids(self.draws.datasets)),
    )

  @property
  def probe_path(self) -> str:
    """Folder of the labelled data set of the probe."""
    return self.config.probe.path or self.parts[0].path

  @property
  def fields(self) -> tuple[str, ...]:
    """Keys of a batch that the training step gets."""
    return self.trainer.fields

  @property
  def shardings(self) -> TrainState:
    return self.layout.shardings

  @property
  def identity(self) -> dict[str, Any]:
    identity = configuration.identity(
      self.config, self._fingerprint, self.num_steps
    )
    for objective in self.objectives:
      identity |= objective.identity
    return identity

  @property
  def _fingerprint(self) -> str:
    """Identifies the training data; with several also by their weights."""
    if len(self.parts) == 1:
      return self.parts[0].dataset.fingerprint
    content = [(part.dataset.fingerprint, part.weight) for part in self.parts]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()

  @functools.cached_property
  def stages(self) -> list[Stage]:
    """Stages of the curriculum; without one, the run is a single stage."""
    ends = [*(later.num_earlier for later in self.by_stage[1:]), self.num_steps]
    return [
      self._stage(experiment, last_step, f"stage {i + 1} of {len(ends)}")
      for i, (experiment, last_step) in enumerate(
        zip(self.by_stage, ends, strict=True)
      )
    ]

  def _stage(self, experiment: Experiment, last_step: int, name: str) -> Stage:
    arithmetic = experiment.flops_per_clip
    return Stage(
      last_step=last_step,
      draws=(
        self.draws
        if experiment is self
        else self._draws(experiment.take_clip.longest_clip)
      ),
      take_clip=experiment.take_clip,
      make_step=functools.partial(self._make_step, experiment, name),
      name="" if experiment is self else name,
      summary=experiment.clips_summary,
      arithmetic=arithmetic,
      peak_clips_per_sec=flops.peak_clips_per_sec(
        arithmetic,
        self.mesh,
        self.config.dtype,
        self.config.matmul_precision,
      ),
    )

  def first_state(self) -> TrainState:
    """Returns random weights, or those of `config.init_from`.

    Raises:
      WeightsError: the weights cannot be read or do not fit.
    """
    state = jax.jit(self.initialise, out_shardings=self.shardings)()
    if self.config.init_from:
      weights = warm_start.read(self.config.init_from)
      state, notices = warm_start.apply(
        weights,
        state,
        self.architecture,
        uses_discriminator=self.trainer.adversarial.weight > 0,
      )
      if jax.process_index() == 0:
        print("\nnote: ".join([f"starts from {weights.source}", *notices]))
    return state

  def _make_step(self, experiment: Experiment, name: str):
    """Returns the compiled step: (state, batch) -> (state, scalars)."""
    make_key = functools.partial(jax.random.key, self.config.seed)
    everywhere = sharding.replicated(self.mesh)
    rng = jax.jit(make_key, out_shardings=everywhere)()
    start = time.monotonic()
    step = experiment.lower_step().compile()
    if jax.process_index() == 0:
      secs = time.monotonic() - start
      of_stage = "" if experiment is self else f" of {name}"
      print(f"compiled the step{of_stage} in {secs:.1f} s", flush=True)
    constants = self._constants_on_devices
    return lambda state, batch: step(state, batch, rng, **constants)

  @functools.cached_property
  def _constants_on_devices(self) -> dict[str, dict]:
    return sharding.put(self.constants, self.constants_shardings)

  def _describe_part(self, part: TrainingData) -> cli.Row:
    dataset = part.dataset
    row = cli.Row(
      "data",
      f"{dataset.path}: split '{dataset.split}', records: "
      f"{dataset.num_records}, videos: {dataset.num_videos}",
    )
    if selection := dataset.selection:
      row.notes.append(
        f"left out, below data.min_quality={selection.min_quality}: records: "
        f"{selection.num_left_out}, videos: {selection.num_videos_left_out}"
      )
    if dataset.is_of_pictures:
      row.notes.append(
        f"pictures: each is repeated to a clip of "
        f"{self.take_clip.clip.num_frames} frames"
      )
    if len(self.parts) > 1:
      share = part.weight / sum(part.weight for part in self.parts)
      row.notes.append(
        f"share of the clips: {share:.2%}; train/loss_rec/{part.name}"
      )
    return row

  def describe(self) -> list[cli.Row]:
    """Returns data, model, masking, devices, batch and steps."""
    config = self.config
    masking = self.task.masking
    rows = [self._describe_part(part) for part in self.parts]
    data = rows[-1]
    unit = config.data.sample_by
    order = config.data.order
    if config.data.shuffle_window:
      order += f" within windows of {config.data.shuffle_window}"
    data.notes.append(f"sampled by {unit}, order {order}")
    num_units = (
      sum(dataset.num_records for dataset in self.draws.datasets)
      if unit == "record"
      else self.draws.clips_per_epoch
    )
    if num_units < self.batch_size:
      data.notes.append(
        f"fewer {unit}s than clips in a batch: a batch holds several clips of "
        f"a {unit}, with different starts and masks"
      )
    devices = cli.Row("devices", sharding.describe(self.mesh))
    if self.mesh.size > 1:
      sizes = ", ".join(f"{axis} {n}" for axis, n in self.mesh.shape.items())
      state_bytes = sharding.bytes_per_device(self.shapes, self.shardings)
      devices.notes.append(
        f"{sizes}; each holds {state_bytes / 1e6:.1f} MB of parameters and "
        "optimiser states"
      )
      devices.notes.extend(self.layout.notes)
    on_cpu = self.mesh.devices.flat[0].platform == "cpu"
    if on_cpu and sys.platform == "linux":
      if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        devices.notes.append(
          "steps are faster with MALLOC_TRIM_THRESHOLD_ set, see CPU in "
          "docs/TRAINING.md"
        )
    batch = f"{self.batch_size} clips"
    if config.data.clips_per_record > 1:
      batch += f", {config.data.clips_per_record} of each record"
    if config.data.draws_per_unit > 1:
      batch += f", {config.data.draws_per_unit} draws of each {unit} in a row"
    num_microbatches = self.trainer.num_microbatches
    if num_microbatches > 1:
      batch += (
        f", in {num_microbatches} microbatches with accumulated gradients"
      )
    num_params = count(self.shapes.params)
    return [
      *rows,
      cli.Row("model", f"{num_params / 1e6:.1f}M parameters, {config.dtype}"),
      cli.Row(
        "masking",
        f"{masking.strategy}: {masking.num_visible} of {masking.num_tokens} "
        "tokens are visible",
      ),
      *(
        cli.Row("loss", f"{x.name}, weight {x.weight:g}: {x.describe()}")
        for x in self.objectives
      ),
      devices,
      cli.Row("batch", batch),
      self._describe_steps(),
    ]

  def _describe_steps(self) -> cli.Row:
    row = cli.Row("steps", f"{self.num_steps}")
    row.notes.extend(configuration.unreached(self.config, self.num_steps))
    if len(self.stages) > 1:
      full = self.stages[-1].arithmetic
      for stage, experiment in zip(self.stages, self.by_stage, strict=True):
        note = (
          f"{stage.name}, to step {stage.last_step}: {stage.summary}, "
          f"{stage.arithmetic / 1e9:.1f} GFLOP per clip "
          f"({stage.arithmetic / full:.0%} of the last)"
        )
        if (num := experiment.num_microbatches) > 1:
          note += f", {num} microbatches"
        row.notes.append(note)
      share = work(self.stages, self.num_steps) / (full * self.num_steps)
      row.notes.append(
        f"all stages: {share:.0%} of the arithmetic of {self.num_steps} steps "
        "of the last; its clips and masks are evaluated throughout"
      )
    return row
