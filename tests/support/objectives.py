"""Every objective of pretraining, as settings of a small run.

A test that holds for MARLIN's objective is parametrised over OBJECTIVES, and so
holds for a new one as soon as it is named here.
"""

from pathlib import Path

import jax
import numpy as np

from marlin_jax.weights import safetensors_folder
from tests.support.demo_models import make_weights

# Stands for the folder of a teacher of these sizes, see `resolved`.
_TEACHER = "a teacher"
_TEACHER_SIZES = {"width": 48, "depth": 3, "num_frames": 4, "image_size": 64}

# name: overrides of configs/pretrain_b.py
OBJECTIVES = {
  "marlin": {},
  "motion": {"target.motion_weight": 0.5},
  "region": {"mask.strategy": "crfr_p", "loss.region_weight": 0.5},
  "teacher": {
    "loss.pixel_weight": 0.5,
    "teacher.layers": "1,3",
    "teacher.path": _TEACHER,
    "teacher.weight": 0.5,
  },
  "contrast": {
    "contrast.dim": 8,
    "contrast.weight": 0.5,
    "data.draws_per_unit": 2,
  },
  "average": {
    "ema_decay": 0.9,
    "teacher.path": "ema",
    "teacher.weight": 0.5,
  },
  "sound": {
    "sound.weight": 0.5,
    "sound.width": 32,
    "sound.depth": 2,
    "sound.num_heads": 2,
    "sound.dec_width": 32,
    "sound.dec_depth": 1,
    "sound.dec_num_heads": 2,
  },
  "variance": {"variance.weight": 0.5},
}
# Sizes of a clip that all of them can take, in seconds on a CPU.
CLIP = {"data.num_frames": 4, "data.frame_size": 64}


def overrides(name: str, folder: Path) -> dict[str, object]:
  """Returns the settings of an objective on small clips; see `resolved`."""
  return resolved(CLIP | OBJECTIVES[name], folder)


def resolved(settings: dict[str, object], folder: Path) -> dict[str, object]:
  """Returns settings with the path of a teacher, if they name one.

  Args:
    settings: those of OBJECTIVES, and others.
    folder: the teacher is written into it.
  """
  if settings.get("teacher.path") != _TEACHER:
    return settings
  path = folder / "teacher"
  if not path.exists():
    safetensors_folder.write(make_weights(**_TEACHER_SIZES), path)
  return settings | {"teacher.path": str(path)}


def random_batch(
  shapes: dict[str, jax.ShapeDtypeStruct], seed: int = 0
) -> dict[str, np.ndarray]:
  """Returns a batch of random values.

  Args:
    shapes: see `Experiment.batch_shapes`.
    seed: of the values.
  """
  np_rng = np.random.default_rng(seed)
  below = {"uint8": 256, "uint16": 2048, "int32": 3}

  def values(x):
    if x.dtype.name in below:
      return np_rng.integers(0, below[x.dtype.name], x.shape, x.dtype)
    return np_rng.normal(size=x.shape).astype(x.dtype)

  return {name: values(x) for name, x in sorted(shapes.items())}
