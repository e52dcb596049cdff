"""Pretraining, as a course of the training loop (training/loop.py)."""

from __future__ import annotations

import functools
import math
import os
import sys
import time
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from marlin_jax.data import sampling
from marlin_jax.data.prepared_dataset import Dataset
from marlin_jax.data.sampling import Draws
from marlin_jax.devices import chips, distributed, sharding
from marlin_jax.pretraining import configuration, flops, warm_start
from marlin_jax.pretraining.build import Experiment, count
from marlin_jax.pretraining.train_step import TrainState
from marlin_jax.records import cli
from marlin_jax.records.segment_index import SegmentIndex
from marlin_jax.weights import formats


class PretrainingCourse(Experiment):
  """An experiment on a data set; a `training.loop.Course`.

  Attributes:
    dataset: training split.

  The other attributes are those of `Experiment`.
  """

  fields = ("video", "regions")

  def __init__(
    self,
    config: ConfigDict,
    dataset: Dataset,
    index: SegmentIndex | None,
    mesh: Mesh,
  ):
    """Builds nothing yet.

    Args:
      config: a valid configuration; see configs/pretrain_b.py.
      dataset: training split.
      index: its segments; not needed with data.sample_by=record.
      mesh: devices.
    """
    # The smallest of all processes, so that they split a batch alike.
    device_bytes = distributed.smallest(
      chips.device_bytes(jax.local_devices()[0])
    )
    super().__init__(config, config.num_steps, mesh, device_bytes)
    self.dataset, self._index = dataset, index
    self.num_steps = config.num_steps or math.ceil(
      config.num_epochs * self.draws.clips_per_epoch / config.batch_size
    )

  @functools.cached_property
  def draws(self) -> Draws:
    """Clips of the training split by their place in the run."""
    settings, seed = self.config.data, self.config.seed
    order = sampling.ORDERS[settings.order]
    if settings.shuffle_window:
      order = functools.partial(order, window=settings.shuffle_window)
    options = {
      "order": order,
      "num_clips": settings.clips_per_record,
    }
    if settings.sample_by == "record":
      return sampling.RecordDraws(self.dataset, seed, **options)
    return sampling.VideoDraws(
      self.dataset,
      self._index,
      self.take_clip.longest_clip,
      seed,
      by_subject=settings.sample_by == "subject",
      **options,
    )

  @property
  def shardings(self) -> TrainState:
    return self.layout.shardings

  @property
  def identity(self) -> dict[str, Any]:
    return configuration.identity(
      self.config, self.dataset.fingerprint, self.num_steps
    )

  @property
  def peak_clips_per_sec(self) -> float | None:
    return flops.peak_clips_per_sec(
      flops.training_step(self.architecture, self.trainer, self.batch_size),
      self.mesh,
      self.config.dtype,
    )

  def first_state(self) -> TrainState:
    """Returns random weights, or those of `config.init_from`.

    Raises:
      WeightsError: the weights cannot be read or do not fit.
    """
    state = jax.jit(self.initialise, out_shardings=self.shardings)()
    if self.config.init_from:
      weights = formats.read(self.config.init_from)
      state, notices = warm_start.apply(
        weights,
        state,
        self.architecture,
        uses_discriminator=self.trainer.adversarial.weight > 0,
      )
      if jax.process_index() == 0:
        print("\nnote: ".join([f"starts from {weights.source}", *notices]))
    return state

  def make_step(self):
    """Returns the compiled step: (state, batch) -> (state, scalars)."""
    make_key = functools.partial(jax.random.key, self.config.seed)
    everywhere = sharding.replicated(self.mesh)
    rng = jax.jit(make_key, out_shardings=everywhere)()
    start = time.monotonic()
    step = self.lower_step().compile()
    if jax.process_index() == 0:
      secs = time.monotonic() - start
      print(f"compiled the step in {secs:.1f} s", flush=True)
    return lambda state, batch: step(state, batch, rng)

  def describe(self) -> list[cli.Row]:
    """Returns data, model, masking, devices, batch and steps."""
    config, dataset = self.config, self.dataset
    masking = self.task.masking
    data = cli.Row(
      "data",
      f"{dataset.path}: split '{dataset.split}', records: "
      f"{dataset.num_records}, videos: {dataset.num_videos}",
    )
    if selection := dataset.selection:
      data.notes.append(
        f"left out, below data.min_quality={selection.min_quality}: records: "
        f"{selection.num_left_out}, videos: {selection.num_videos_left_out}"
      )
    unit = config.data.sample_by
    order = config.data.order
    if config.data.shuffle_window:
      order += f" within windows of {config.data.shuffle_window}"
    data.notes.append(f"sampled by {unit}, order {order}")
    num_units = (
      dataset.num_records if unit == "record" else self.draws.clips_per_epoch
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
    num_microbatches = self.trainer.num_microbatches
    if num_microbatches > 1:
      batch += (
        f", in {num_microbatches} microbatches with accumulated gradients"
      )
    num_params = count(self.shapes.params)
    return [
      data,
      cli.Row("model", f"{num_params / 1e6:.1f}M parameters, {config.dtype}"),
      cli.Row(
        "masking",
        f"{masking.strategy}: {masking.num_visible} of {masking.num_tokens} "
        "tokens are visible",
      ),
      devices,
      cli.Row("batch", batch),
      cli.Row("steps", f"{self.num_steps}"),
    ]
