"""The extra objectives and the rules of their keys, `config.NAME.KEY`.

The module imports no jax: a configuration is checked before devices are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from marlin_jax.training.configuration import (
  BETWEEN_0_AND_1,
  LOCAL,
  Key,
  above,
  at_least,
  fixed,
  free,
)

if TYPE_CHECKING:
  from marlin_jax.objectives.objective import Objective, Run

# Name of an objective -> rules of its keys beside `weight`.
_KEYS: Mapping[str, Mapping[str, Key]] = {
  # A checkpoint records the hash of the teacher's encoder instead of its path.
  "teacher": {"path": free(LOCAL), "layers": fixed(before="")},
  "sound": {
    "mask_ratio": fixed(BETWEEN_0_AND_1, before=0.8),
    "width": fixed(at_least(1), before=384),
    "depth": fixed(at_least(1), before=10),
    "num_heads": fixed(at_least(1), before=6),
    "dec_width": fixed(at_least(1), before=192),
    "dec_depth": fixed(at_least(1), before=4),
    "dec_num_heads": fixed(at_least(1), before=3),
    "contrast_weight": fixed(at_least(0), before=0.0025),
    "temperature": fixed(above(0), before=0.07),
  },
  "contrast": {
    "temperature": fixed(above(0), before=0.1),
    "dim": fixed(at_least(1), before=128),
  },
  "variance": {"covariance_weight": fixed(at_least(0), before=0.04)},
}
# Names that objectives add to the identity of a run.
IDENTITIES = ("teacher.sha256",)

# Rules by dotted key.
KEYS = {
  f"{name}.{key}": rule
  for name, rules in _KEYS.items()
  for key, rule in (
    ("weight", fixed(at_least(0), before=0.0)),
    *rules.items(),
  )
}


def names(config: ConfigDict) -> list[str]:
  """Returns the names of the objectives that a run has: of weight above 0."""
  return [name for name in _KEYS if config[name].weight > 0]


def problems(config: ConfigDict) -> Iterator[str]:
  """Yields a line for each combination of keys that cannot be run."""
  pixel_weight = config.loss.pixel_weight
  if not pixel_weight and not names(config):
    yield (
      "loss.pixel_weight=0: expected another objective with a weight above 0"
    )
  if not pixel_weight and config.adv.weight:
    yield (
      f"adv.weight={config.adv.weight}: expected 0 with loss.pixel_weight=0, "
      "without which no pixels are learned that could be judged"
    )
  if config.teacher.weight:
    yield from _teacher_problems(config)
  for prefix in ("", "dec_"):
    width, heads = (config.sound[prefix + k] for k in ("width", "num_heads"))
    if heads >= 1 and width % (2 * heads):
      yield (
        f"sound.{prefix}width={width}: expected a multiple of twice "
        f"sound.{prefix}num_heads={heads}"
      )
  if config.contrast.weight:
    yield from _contrast_problems(config)


def _teacher_problems(config: ConfigDict) -> Iterator[str]:
  path, layers = config.teacher.path, config.teacher.layers
  if not path:
    yield (
      "teacher.path='': name a run or a checkpoint, or 'ema', with "
      f"teacher.weight={config.teacher.weight}"
    )
  if path == "ema" and not config.ema_decay:
    yield "ema_decay=0: expected a value above 0 with teacher.path='ema'"
  try:
    numbers = layer_numbers(layers)
  except ValueError:
    numbers = [0]
  if numbers != sorted(set(numbers)) or min(numbers, default=1) < 1:
    yield (
      f"teacher.layers={layers!r}: expected '' or numbers of blocks from 1, in "
      "rising order, joined by commas"
    )


def _contrast_problems(config: ConfigDict) -> Iterator[str]:
  data = config.data
  together = data.clips_per_record * data.draws_per_unit
  if together < 2:
    yield (
      f"data.draws_per_unit={data.draws_per_unit}: expected at least 2 with "
      f"contrast.weight={config.contrast.weight}, which compares clips of one "
      "person; or data.clips_per_record of at least 2"
    )
  if data.sample_by == "record":
    yield (
      "data.sample_by='record': expected 'subject' or 'video' with "
      f"contrast.weight={config.contrast.weight}, which must know whose clips "
      "are whose"
    )


def layer_numbers(layers: str) -> list[int]:
  """Returns the numbers in `teacher.layers`; [] for ''.

  Raises:
    ValueError: one of them is no number.
  """
  return [int(number) for number in layers.split(",") if layers]


def make(run: Run) -> tuple[Objective, ...]:
  """Returns the objectives of a run.

  Raises:
    UserError: the run cannot have one of them.
  """
  # Imported here, since they import jax.
  from marlin_jax.objectives.audio_visual import AudioVisual
  from marlin_jax.objectives.contrast import Contrast
  from marlin_jax.objectives.teacher import Teacher
  from marlin_jax.objectives.variance import Variance

  classes: dict[str, type[Objective]] = {
    "teacher": Teacher,
    "sound": AudioVisual,
    "contrast": Contrast,
    "variance": Variance,
  }
  return tuple(classes[name](run) for name in names(run.config))
