"""Pretraining, as a course of the training loop (training/loop.py)."""

from __future__ import annotations

import functools
import math
import os
import sys
import time

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from marlin_jax.data.prepared_dataset import Dataset
from marlin_jax.devices import chips, distributed, sharding
from marlin_jax.pretraining import build, configuration, flops, warm_start
from marlin_jax.pretraining.train_step import TrainState
from marlin_jax.records import cli
from marlin_jax.weights import formats


class PretrainingCourse:
  """Pretraining of a masked autoencoder; a `training.loop.Course`.

  Attributes:
    trainer: static half of the training step; holds the pretext task.
    architecture: sizes of both networks.

  The other attributes are those of `training.loop.Course`.
  """

  fields = ("video", "regions")

  def __init__(self, config: ConfigDict, dataset: Dataset, mesh: Mesh):
    """Builds the networks' structure; allocates nothing.

    Args:
      config: a valid configuration; see configs/pretrain_b.py.
      dataset: training split.
      mesh: devices.
    """
    self._config, self.dataset, self.mesh = config, dataset, mesh
    self.batch_size = config.batch_size
    self.num_steps = config.num_steps or math.ceil(
      config.num_epochs * dataset.num_videos / config.batch_size
    )
    experiment = build.make_experiment(
      config,
      self.num_steps,
      mesh,
      # The smallest of all processes, so that they split a batch alike.
      distributed.smallest(chips.device_bytes(jax.local_devices()[0])),
    )
    self.trainer, self.architecture = (
      experiment.trainer,
      experiment.architecture,
    )
    self.take_clip = experiment.take_clip
    self.learning_rates = experiment.learning_rates
    self._initialise = experiment.initialise
    self.shapes = jax.eval_shape(self._initialise)
    self._layout = build.lay_out(self.architecture, mesh, self.shapes)
    self.shardings = self._layout.shardings
    self.identity = configuration.identity(
      config, dataset.fingerprint, self.num_steps
    )
    self.peak_clips_per_sec = flops.peak_clips_per_sec(
      flops.training_step(self.architecture, self.trainer, self.batch_size),
      mesh,
      config.dtype,
    )

  def first_state(self) -> TrainState:
    """Returns random weights, or those of `config.init_from`.

    Raises:
      WeightsError: the weights cannot be read or do not fit.
    """
    state = jax.jit(self._initialise, out_shardings=self.shardings)()
    if self._config.init_from:
      weights = formats.read(self._config.init_from)
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
    make_key = functools.partial(jax.random.key, self._config.seed)
    everywhere = sharding.replicated(self.mesh)
    rng = jax.jit(make_key, out_shardings=everywhere)()
    start = time.monotonic()
    step = build.lower_step(
      self.trainer, self.shapes, self._layout, self.mesh, self.batch_size
    ).compile()
    if jax.process_index() == 0:
      secs = time.monotonic() - start
      print(f"compiled the step in {secs:.1f} s", flush=True)
    return lambda state, batch: step(state, batch, rng)

  def describe(self) -> list[cli.Row]:
    """Returns data, model, masking, devices, batch and steps."""
    config, dataset, masking = (
      self._config,
      self.dataset,
      self.trainer.task.masking,
    )
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
      devices.notes.extend(self._layout.notes)
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
    num_params = build.count(self.shapes.params)
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
