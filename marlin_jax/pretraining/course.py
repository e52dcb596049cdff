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

from marlin_jax.data.prepared_dataset import Dataset
from marlin_jax.data.sampling import RecordDraws, StoredOrder
from marlin_jax.devices import chips, distributed, sharding
from marlin_jax.pretraining import configuration, flops, warm_start
from marlin_jax.pretraining.build import Experiment, count
from marlin_jax.pretraining.train_step import TrainState
from marlin_jax.records import cli
from marlin_jax.weights import formats


class PretrainingCourse(Experiment):
  """An experiment on a data set; a `training.loop.Course`.

  Attributes:
    dataset: training split.

  The other attributes are those of `Experiment`.
  """

  fields = ("video", "regions")

  def __init__(self, config: ConfigDict, dataset: Dataset, mesh: Mesh):
    """Builds nothing yet.

    Args:
      config: a valid configuration; see configs/pretrain_b.py.
      dataset: training split.
      mesh: devices.
    """
    num_steps = config.num_steps or math.ceil(
      config.num_epochs * dataset.num_videos / config.batch_size
    )
    # The smallest of all processes, so that they split a batch alike.
    device_bytes = distributed.smallest(
      chips.device_bytes(jax.local_devices()[0])
    )
    super().__init__(config, num_steps, mesh, device_bytes)
    self.dataset = dataset
    self.draws = RecordDraws(
      dataset,
      config.seed,
      order=StoredOrder,
      num_clips=config.data.clips_per_record,
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
    if dataset.num_records < self.batch_size:
      data.notes.append(
        "fewer records than clips in a batch: a batch holds several clips of a "
        "record, with different starts and masks"
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
