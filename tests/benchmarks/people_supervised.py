"""Trains the encoder with the labels themselves: a check of the chain.

The network that is pretrained, from the same random weights, here with a linear
head, learns the labels of the windows of the people of `train`. Clips, sizes
and probes are those of the other encoders, so this is about what they could
reach on these people if they learned the right things. The round of its steps
with the best score on `val` is kept; nobody of the unseen people is looked at.

Axes: W windows, B clips, T frames, S pixels of the square picture, K labels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from marlin_jax.data import augmentation
from marlin_jax.data.augmentation import Augmentation, View
from marlin_jax.data.clip_geometry import Clip
from marlin_jax.devices import sharding
from marlin_jax.downstream import (
  clip_batches,
  fit,
  learner,
  protocols,
  splits,
)
from marlin_jax.downstream.tasks import VALUE, Task, Units
from marlin_jax.pretraining import flops
from marlin_jax.records import schema
from marlin_jax.weights.architecture import Architecture
from marlin_jax.weights.weights import Weights
from tests.benchmarks import people_probes, people_windows
from tests.benchmarks.people_report import HEAD, METHODS, SUPERVISED, Encoder
from tests.benchmarks.people_windows import FIT, LABELS, UNSEEN, Windows

if TYPE_CHECKING:
  from tests.benchmarks.people import Study

TRAIN, HELD_OUT = FIT
TASK = Task("labels", "labels", VALUE, LABELS)
# Evaluations on HELD_OUT, between which the best is chosen.
NUM_ROUNDS = 8


def flops_per_clip(architecture: Architecture) -> float:
  """Returns the FLOPs of a training step for a clip, as `flops` counts them."""
  tubelets = architecture.tubelets
  # Nothing needs the gradient of the pixels.
  embed = 2 * tubelets.num_tokens * tubelets.pixels * architecture.width
  return 3 * flops.features(architecture) - embed


def train(
  study: Study, encoder: Encoder, windows: Windows
) -> tuple[Weights, dict[str, np.ndarray]]:
  """Trains an encoder, or resumes.

  Each round of the study is a training of its own, with its own decay of the
  learning rate.

  Returns:
    Weights of the encoder, and the answers of its own head, see
    `people_probes.answers`; their `r2` is on HELD_OUT.

  Raises:
    KeyboardInterrupt: a signal ended the training, which has saved.
  """
  config = study.config(METHODS[SUPERVISED])
  num_steps = study.num_steps(SUPERVISED, encoder.steps)
  settings = {
    **config.optim,
    "batch_size": config.batch_size,
    "epochs": 0,
    "min_steps": num_steps,
    "num_rounds": min(NUM_ROUNDS, num_steps),
  }
  model = learner.on_encoder(
    TASK,
    study.untrained(encoder.seed),
    ConfigDict(settings),
    sharding.make_mesh(1, devices=jax.local_devices()[:1]),
    encoder.seed,
    attentive=False,
    tuned="all",
    dtype=config.dtype,
    attention=config.attention,
    remat=config.remat,
  )
  plan = protocols.plan_training(model.config, num_videos=0)
  units = Units.of(TASK, windows.labels[windows.rows(TRAIN)])
  clips = functools.partial(study.clips, model.architecture, windows)
  # Read once, for all rounds.
  held_out = list(clips([HELD_OUT]))

  def predict(trained, some_clips, pause=lambda: None) -> np.ndarray:
    trained = learner.in_units(trained, units)
    predicted = []
    for _, video in some_clips:
      pause()
      predicted.append(np.asarray(model.logits(trained, video), np.float64))
    return np.concatenate(predicted)

  truth = windows.labels[windows.rows(HELD_OUT)]

  def score(trained, pause) -> float:
    predicted = predict(trained, held_out, pause)
    return TASK.score(truth, predicted, micro=False)

  num_steps = plan.num_rounds * plan.round_steps
  name = f"{SUPERVISED}, seed {encoder.seed}"
  with tqdm(total=num_steps, unit="step", desc=name, mininterval=1.0) as bar:

    def report(text: str, steps: int) -> None:
      bar.update(steps)
      bar.set_postfix_str(text)

    fitted = fit.fit(
      model,
      plan,
      functools.partial(_batches, study, windows, config, units, encoder.seed),
      score,
      seed=encoder.seed,
      folder=study.workdir(*encoder[:2]) / str(encoder.steps),
      identity=study.overrides | {"num_steps": num_steps},
      report=report,
    )
  unseen = predict(fitted.trained, clips([UNSEEN]))
  errors = np.square(predict(fitted.trained, held_out) - truth).mean(axis=0)
  people = windows.person[windows.rows(UNSEEN)]
  return model.encoder_weights(model.gathered(fitted.trained)), {
    f"{HEAD}/labels": unseen,
    f"{HEAD}/r2": 1 - errors / truth.var(axis=0),
    f"{HEAD}/changes": people_probes.changes(unseen, people),
  }


# --- Training batches ---------------------------------------------------------


def _batches(
  study: Study,
  windows: Windows,
  config: ConfigDict,
  units: Units,
  seed: int,
  step: int,
) -> Iterator[fit.Batch]:
  """Yields augmented clips of TRAIN and their labels, from a step on."""
  split = splits.open_split(str(study.dataset), TRAIN, study.folder / "index")
  clip = Clip(config.data.num_frames, config.data.stride)
  changes = Augmentation(**config.augment)
  order = clip_batches.Order(windows.rows(TRAIN), seed)
  size = config.data.frame_size
  shape = (config.batch_size, 1, clip.num_frames, size, size, 3)
  while True:
    np_rng = np.random.default_rng((seed, step))
    rows = order.rows(step, config.batch_size)
    labels = windows.labels[rows]
    video = np.empty(shape, np.uint8)
    for row, own, out in zip(rows, labels, video, strict=True):
      track = split.tracks[windows.track[row]]
      record = schema.joined(
        [split.dataset.source[i][1] for i in track.records]
      )
      view = changes.draw_view(np_rng)
      start = windows.start[row]
      frames = clip.indices(start, track.num_frames)
      augmentation.decode(record, frames[None], [view], out)
      labelled = people_windows.LABELLED.indices(start, track.num_frames)
      own[LABELS.index("hair")] = people_windows.hair(
        visible(record.regions[labelled], view)
      )
    labels, known = TASK.encode(labels)
    yield video[:, 0], units.standardised(labels), known
    step += 1


def visible(regions: np.ndarray, view: View) -> np.ndarray:
  """Returns the regions of patches whose middle is seen, (T, g, g) -> (T, P).

  A crop changes the share of a picture that hair has, and no other label.
  """
  patch = schema.FRAME_SIZE // regions.shape[1]
  middles = np.arange(patch // 2, schema.FRAME_SIZE, patch)
  x, y, width, height = view.box
  columns = (x <= middles) & (middles < x + width)
  rows = (y <= middles) & (middles < y + height)
  return regions[:, rows[:, None] & columns]
