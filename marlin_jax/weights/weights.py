"""A network's weights outside a training run, in one form for all formats.

Arrays are named by their place in this project's modules, joined with dots:
`encoder.transformer.blocks.0.attention.query.kernel`; the discriminator's begin
with `discriminator.`. All are float32.

Axes: N tokens, D width, P pixels per token.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from marlin_jax.data.clip_geometry import (
  IMAGENET_MEAN,
  IMAGENET_STD,
  SoundPatches,
)
from marlin_jax.models import stacking, vit
from marlin_jax.models.discriminator import Discriminator
from marlin_jax.models.mae import MAE, Encoder
from marlin_jax.records.cli import UserError, counted
from marlin_jax.weights.architecture import (
  DISCRIMINATOR,
  Architecture,
  flatten,
  shapes_of,
  unflatten,
)


class WeightsError(UserError):
  """Weights that cannot be read, or that do not fit their architecture."""


@dataclasses.dataclass(frozen=True)
class Weights:
  """An architecture and exactly its arrays.

  Attributes:
    architecture: sizes and input convention of the network.
    arrays: float32 arrays by name.
    source: origin of the arrays, for messages.

  Raises:
    WeightsError: at construction, listing the architecture's problems, or every
      array that is missing, unknown, of another dtype, or of another shape than
      the architecture has.
  """

  architecture: Architecture
  arrays: dict[str, np.ndarray]
  source: str = "these weights"

  def __post_init__(self):
    if problems := self.architecture.problems():
      raise WeightsError(f"{self.source}: {'; '.join(problems)}")
    expected = self.architecture.shapes()
    names = self.arrays.keys()
    problems = [f"{name}: missing" for name in sorted(expected.keys() - names)]
    problems += [
      f"{name}: not known" for name in sorted(names - expected.keys())
    ]
    problems += [
      f"{name}: shape {self.arrays[name].shape}, expected {shape}"
      for name, shape in expected.items()
      if name in self.arrays and self.arrays[name].shape != shape
    ]
    problems += [
      f"{name}: {array.dtype}, expected float32"
      for name, array in self.arrays.items()
      if array.dtype != np.float32
    ]
    if problems:
      raise WeightsError(
        f"{self.source} does not fit in {counted(len(problems), 'array')}\n"
        + "\n".join(f"  {problem}" for problem in problems)
      )

  def autoencoder(self, **execution) -> MAE | Encoder:
    """Returns the MAE, or the Encoder if there is no decoder.

    Args:
      **execution: `dtype`, `attention`, `scan`, `remat`; see vit.Execution.
    """
    return _filled(
      lambda: self.architecture.make_autoencoder(**execution),
      self.arrays,
      self.architecture.prefix,
    )

  def discriminator(self) -> Discriminator:
    """Returns the discriminator.

    Raises:
      WeightsError: the weights hold none.
    """
    if not self.architecture.has_discriminator:
      raise WeightsError(f"{self.source} holds no discriminator")
    return _filled(
      self.architecture.make_discriminator, self.arrays, DISCRIMINATOR
    )

  def encoder_only(self) -> Weights:
    """Returns the encoder's weights."""
    return Weights(
      self.architecture.without_decoder(),
      {k: v for k, v in self.arrays.items() if k.startswith("encoder.")},
      self.source,
    )

  def without_discriminator(self) -> Weights:
    """Returns the autoencoder's weights."""
    return Weights(
      dataclasses.replace(self.architecture, disc_hidden=0),
      {k: v for k, v in self.arrays.items() if not k.startswith(DISCRIMINATOR)},
      self.source,
    )

  def with_plain_input(self) -> Weights:
    """Returns the same function of plain pixels in [0, 1], to rounding.

    Folds ImageNet's normalisation into the patch embedding: the kernel is
    divided by the standard deviation, and the bias absorbs the mean.
    """
    if not self.architecture.imagenet_input:
      return self
    return self._with_input(
      1 / np.asarray(IMAGENET_STD),
      -np.asarray(IMAGENET_MEAN) / np.asarray(IMAGENET_STD),
      imagenet_input=False,
    )

  def with_imagenet_input(self) -> Weights:
    """Returns the same function of ImageNet-normalised pixels, to rounding.

    The inverse of `with_plain_input`.
    """
    if self.architecture.imagenet_input:
      return self
    return self._with_input(
      np.asarray(IMAGENET_STD), np.asarray(IMAGENET_MEAN), imagenet_input=True
    )

  def _with_input(self, scale, shift, *, imagenet_input):
    """Returns the network f(scale * x + shift) of x, where self is f."""
    kernel = self.arrays["encoder.patch_embedding.kernel"].astype(np.float64)
    bias = self.arrays["encoder.patch_embedding.bias"].astype(np.float64)
    colours = kernel.reshape(3, -1, kernel.shape[-1])  # P is ordered c pt ph pw
    new_kernel = (colours * scale[:, None, None]).reshape(kernel.shape)
    new_bias = bias + np.einsum("cpd,c->d", colours, shift)
    return Weights(
      dataclasses.replace(self.architecture, imagenet_input=imagenet_input),
      self.arrays
      | {
        "encoder.patch_embedding.kernel": new_kernel.astype(np.float32),
        "encoder.patch_embedding.bias": new_bias.astype(np.float32),
      },
      self.source,
    )


@dataclasses.dataclass(frozen=True)
class SoundWeights:
  """Encoder of sound, which a run with the objective `sound` trains.

  Attributes:
    patches: token grid of a clip's sound.
    size: size of the encoder.
    arrays: float32 arrays by name, such as `patch_embedding.kernel`.
    source: origin of the arrays, for messages.
  """

  patches: SoundPatches
  size: vit.Size
  arrays: dict[str, np.ndarray]
  source: str

  def encoder(self, **execution) -> Encoder:
    """Returns the encoder.

    Args:
      **execution: `dtype`, `attention`, `scan`, `remat`; see vit.Execution.
    """

    def make():
      return Encoder(
        num_tokens=self.patches.num_tokens,
        pixels=self.patches.values,
        size=self.size,
        execution=vit.Execution(**execution),
        rngs=nnx.Rngs(0),
      )

    return _filled(make, self.arrays)

  @property
  def sha256(self) -> str:
    """Hash of the encoder."""
    return _sha256(
      dataclasses.asdict(self.patches) | dataclasses.asdict(self.size),
      self.arrays,
    )


# Fields of `Architecture` that are younger than the first hashes.
_NOT_HASHED_BY_DEFAULT = ("motion_weight",)


def encoder_sha256(weights: Weights) -> str:
  """Returns the hash of the encoder; it does not depend on the file format.

  Workdirs, kept models and feature folders hold it. So a field that is added to
  `Architecture` counts only where it has not its default value.
  """
  encoder = weights.encoder_only()
  architecture = {
    field.name: value
    for field in dataclasses.fields(encoder.architecture)
    if (value := getattr(encoder.architecture, field.name)) != field.default
    or field.name not in _NOT_HASHED_BY_DEFAULT
  }
  return _sha256(architecture, encoder.arrays)


def _sha256(sizes: dict[str, Any], arrays: dict[str, np.ndarray]) -> str:
  digest = hashlib.sha256(json.dumps(sizes, sort_keys=True).encode())
  for name in sorted(arrays):
    digest.update(name.encode())
    digest.update(arrays[name].tobytes())
  return digest.hexdigest()


def _filled(make, arrays: dict[str, np.ndarray], prefix: str = ""):
  """Returns the module that `make` draws, with these arrays."""
  given = {name: jnp.asarray(arrays[prefix + name]) for name in shapes_of(make)}
  graphdef, like = nnx.split(nnx.eval_shape(make))
  like = nnx.to_pure_dict(like)
  return nnx.merge(graphdef, stacking.in_form_of(like, unflatten(given)))


def eps_notice(
  architecture: Architecture, eps: float, reader: str
) -> list[str]:
  """Returns a notice if a format cannot store the LayerNorm epsilon.

  Args:
    architecture: architecture of the weights.
    eps: the epsilon that readers of the format use.
    reader: name of those readers, for the message.
  """
  if architecture.norm_eps == eps:
    return []
  return [
    f"LayerNorm's epsilon is {architecture.norm_eps:g} in these weights and "
    f"{eps:g} in {reader}: features differ slightly"
  ]


def motion_notice(architecture: Architecture) -> list[str]:
  """Returns a notice for formats that cannot say what the decoder predicts."""
  if not architecture.motion_weight:
    return []
  return [
    "the decoder predicts differences between the frames of a token "
    "(target.motion_weight), which readers of this format do not undo"
  ]


def of_modules(
  architecture: Architecture, params: dict, disc_params: dict | None = None
) -> Weights:
  """Returns weights from nested dicts of arrays.

  Args:
    architecture: architecture of the network.
    params: all arrays of the autoencoder, including position tables.
    disc_params: arrays of the discriminator, if there is one.

  Raises:
    WeightsError: the arrays do not fit the architecture.
  """
  arrays = {
    architecture.prefix + k: np.asarray(jax.device_get(v))
    for k, v in flatten(params).items()
  }
  for name, value in flatten(disc_params or {}).items():
    arrays[DISCRIMINATOR + name] = np.asarray(jax.device_get(value))
  return Weights(architecture, arrays)
