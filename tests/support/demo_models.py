"""Small weights and a kept model for tests of the demo."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from flax import nnx

from marlin_jax.inference import classifier
from marlin_jax.weights import safetensors_folder
from marlin_jax.weights.architecture import Architecture
from marlin_jax.weights.weights import Weights, encoder_sha256, of_modules

_SIZES = {
  "width": 32,
  "depth": 1,
  "num_heads": 2,
  "mlp_dim": 64,
  "dec_width": 16,
  "dec_depth": 1,
  "dec_num_heads": 2,
  "dec_mlp_dim": 32,
  "num_frames": 4,
}


def make_weights(**changes) -> Weights:
  """Returns random weights of a small network."""
  architecture = Architecture(**_SIZES | changes)
  model = architecture.make_autoencoder()
  return of_modules(architecture, nnx.to_pure_dict(nnx.state(model)))


def make_classifier(
  folder: Path, names: Sequence[str], kind: str = "class", **changes
) -> Path:
  """Writes an encoder, and a model of K classes, labels or numbers on it.

  Returns:
    The folder of the model.
  """
  weights = make_weights(**changes)
  safetensors_folder.write(weights, folder / "encoder")
  np_rng = np.random.default_rng(0)
  kernel = np_rng.normal(size=(weights.architecture.width, len(names)))
  bias = np_rng.normal(size=len(names))
  classifier.write(
    folder / "model",
    classifier.Description(
      task="mood",
      names=tuple(names),
      kind=kind,
      head="linear",
      thresholds=(),
      encoder=str(folder / "encoder"),
      encoder_sha256=encoder_sha256(weights),
    ),
    classifier.Head("linear", {"kernel": kernel, "bias": bias}),
  )
  return folder / "model"
