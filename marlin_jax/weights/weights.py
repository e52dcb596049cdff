"""A network's weights outside a training run: what every format turns into.

Arrays are named by their place in this project's modules, joined with dots:
`encoder.transformer.blocks.0.attention.query.kernel`; the discriminator's begin
with `discriminator.`. All are float32.

Axes: N tokens, D width, P pixels per token.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from marlin_jax.data.clip_geometry import Clip, Tubelets
from marlin_jax.models import stacking
from marlin_jax.models.discriminator import Discriminator
from marlin_jax.models.mae import MAE, Encoder
from marlin_jax.models.vit import NORM_EPS
from marlin_jax.pretraining.train_step import IMAGENET_MEAN, IMAGENET_STD
from marlin_jax.records.cli import UserError

_DISCRIMINATOR = "discriminator."


class WeightsError(UserError):
  """The weights cannot be read, or do not fit; the message says which."""


@dataclasses.dataclass(frozen=True)
class Architecture:
  """What must be known beside the arrays.

  Attributes:
    width, depth, num_heads, mlp_dim: of the encoder.
    dec_width, dec_depth, dec_num_heads, dec_mlp_dim: of the decoder, 0 where
      there is none.
    disc_hidden: of the discriminator, 0 where there is none.
    num_frames: per clip.
    stride: source frames from one frame of a clip to the next.
    image_size: height and width of a frame in pixels.
    tubelet_size, patch_size: a token's frames, and its height and width.
    norm_pix: the decoder predicts pixels normalised by token (VideoMAE).
    imagenet_input: the encoder expects pixels normalised with ImageNet's
      statistics (VideoMAE) instead of plain ones in [0, 1] (MARLIN).
    norm_eps: of every LayerNorm.
  """

  width: int
  depth: int
  num_heads: int
  mlp_dim: int
  dec_width: int = 0
  dec_depth: int = 0
  dec_num_heads: int = 0
  dec_mlp_dim: int = 0
  disc_hidden: int = 0
  num_frames: int = 16
  stride: int = 2
  image_size: int = 224
  tubelet_size: int = 2
  patch_size: int = 16
  norm_pix: bool = False
  imagenet_input: bool = False
  norm_eps: float = NORM_EPS

  @property
  def clip(self) -> Clip:
    return Clip(self.num_frames, self.stride)

  @property
  def tubelets(self) -> Tubelets:
    return Tubelets(
      self.num_frames, self.image_size, self.tubelet_size, self.patch_size
    )

  @property
  def has_decoder(self) -> bool:
    return self.dec_depth > 0

  @property
  def has_discriminator(self) -> bool:
    return self.disc_hidden > 0

  def without_decoder(self) -> Architecture:
    return dataclasses.replace(
      self,
      dec_width=0,
      dec_depth=0,
      dec_num_heads=0,
      dec_mlp_dim=0,
      disc_hidden=0,
      norm_pix=False,
    )

  def make_autoencoder(self, **how) -> MAE | Encoder:
    """A freshly drawn MAE, or Encoder where there is no decoder.

    Args:
      **how: `dtype`, `attention`, `scan`, `remat`; see models.mae.MAE.
    """
    how = {"attention": "plain", "scan": False, "remat": "none"} | how
    sizes = {
      "num_tokens": self.tubelets.num_tokens,
      "pixels": self.tubelets.pixels,
      "width": self.width,
      "depth": self.depth,
      "num_heads": self.num_heads,
      "mlp_dim": self.mlp_dim,
      "norm_eps": self.norm_eps,
    }
    if not self.has_decoder:
      return Encoder(**sizes, rngs=nnx.Rngs(0), **how)
    return MAE(
      **sizes,
      dec_width=self.dec_width,
      dec_depth=self.dec_depth,
      dec_num_heads=self.dec_num_heads,
      dec_mlp_dim=self.dec_mlp_dim,
      start_grey=False,
      rngs=nnx.Rngs(0),
      **how,
    )

  def make_discriminator(self) -> Discriminator:
    return Discriminator(
      pixels=self.tubelets.pixels, hidden=self.disc_hidden, rngs=nnx.Rngs(0)
    )

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """The name and shape of every array such a network has."""
    modules = {self._prefix: self.make_autoencoder}
    if self.has_discriminator:
      modules[_DISCRIMINATOR] = self.make_discriminator
    return {
      prefix + name: value.shape
      for prefix, make in modules.items()
      for name, value in _shapes(make).items()
    }

  @property
  def _prefix(self) -> str:
    return "" if self.has_decoder else "encoder."


@dataclasses.dataclass(frozen=True)
class Weights:
  """An architecture and all its arrays; wrong sets are refused.

  Attributes:
    architecture: see there.
    arrays: float32 by name.
    source: where they were read from, for messages.

  Raises:
    WeightsError: at construction, naming every array that is missing, that is
      not known, or that has another shape than the architecture says.
  """

  architecture: Architecture
  arrays: dict[str, np.ndarray]
  source: str = "these weights"

  def __post_init__(self):
    expected = self.architecture.shapes()
    problems = _differences(expected, self.arrays)
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
        f"{self.source}: {len(problems)} array(s) do not fit\n"
        + "\n".join(f"  {problem}" for problem in problems)
      )

  def autoencoder(self, **how) -> MAE | Encoder:
    """The network with these weights; see Architecture.make_autoencoder."""
    return self._fill(
      lambda: self.architecture.make_autoencoder(**how),
      self.architecture._prefix,
    )

  def discriminator(self) -> Discriminator:
    """The discriminator with these weights.

    Raises:
      WeightsError: there is none.
    """
    if not self.architecture.has_discriminator:
      raise WeightsError(f"{self.source}: there is no discriminator in it")
    return self._fill(self.architecture.make_discriminator, _DISCRIMINATOR)

  def _fill(self, make, prefix):
    arrays = {
      name: jnp.asarray(self.arrays[prefix + name]) for name in _shapes(make)
    }
    graphdef, like = nnx.split(nnx.eval_shape(make))
    like = nnx.to_pure_dict(like)
    return nnx.merge(graphdef, stacking.in_form_of(like, unflatten(arrays)))

  def encoder_only(self) -> Weights:
    """The same without decoder and discriminator."""
    return Weights(
      self.architecture.without_decoder(),
      {k: v for k, v in self.arrays.items() if k.startswith("encoder.")},
      self.source,
    )

  def without_discriminator(self) -> Weights:
    """The same without discriminator."""
    return Weights(
      dataclasses.replace(self.architecture, disc_hidden=0),
      {
        k: v for k, v in self.arrays.items() if not k.startswith(_DISCRIMINATOR)
      },
      self.source,
    )

  def with_plain_input(self) -> Weights:
    """The same network for plain pixels in [0, 1] as input.

    ImageNet's normalisation is folded into the patch embedding: weights over
    the deviation, and the mean's share taken off the bias. Equal to rounding.
    """
    if not self.architecture.imagenet_input:
      return self
    return self._with_input(
      1 / np.asarray(IMAGENET_STD),
      -np.asarray(IMAGENET_MEAN) / np.asarray(IMAGENET_STD),
      imagenet_input=False,
    )

  def with_imagenet_input(self) -> Weights:
    """The same network for ImageNet-normalised pixels; undoes the other."""
    if self.architecture.imagenet_input:
      return self
    return self._with_input(
      np.asarray(IMAGENET_STD), np.asarray(IMAGENET_MEAN), imagenet_input=True
    )

  def _with_input(self, scale, shift, *, imagenet_input):
    """The network whose input is x where `scale * x + shift` was expected."""
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


def encoder_sha256(weights: Weights) -> str:
  """Hash of the encoder, whatever format its weights are kept in."""
  encoder = weights.encoder_only()
  architecture = dataclasses.asdict(encoder.architecture)
  digest = hashlib.sha256(json.dumps(architecture, sort_keys=True).encode())
  for name in sorted(encoder.arrays):
    digest.update(name.encode())
    digest.update(encoder.arrays[name].tobytes())
  return digest.hexdigest()


def eps_notice(architecture: Architecture, eps: float, whose: str) -> list[str]:
  """What to say where a LayerNorm's eps does not come along."""
  if architecture.norm_eps == eps:
    return []
  return [
    f"LayerNorm's eps was {architecture.norm_eps:g} and is {eps:g} in {whose}: "
    "features differ a little"
  ]


def flatten(module: nnx.Module | dict) -> dict[str, jax.Array]:
  """A module's arrays, or nested dicts of them, by name.

  Of joined blocks each has its own: 'a.blocks.0.b'.
  """
  if isinstance(module, nnx.Module):
    module = nnx.to_pure_dict(nnx.state(module))
  flat = flax.traverse_util.flatten_dict(stacking.split(module))
  return {".".join(map(str, path)): leaf for path, leaf in flat.items()}


def unflatten(arrays: dict[str, np.ndarray]) -> dict:
  """The inverse of `flatten`, as nested dicts, block by block."""
  return flax.traverse_util.unflatten_dict(
    {
      tuple(int(key) if key.isdigit() else key for key in name.split(".")): x
      for name, x in arrays.items()
    }
  )


def _shapes(make):
  return jax.eval_shape(lambda: flatten(make()))


def of_modules(
  architecture: Architecture, params: dict, disc_params: dict | None = None
) -> Weights:
  """Weights out of pytrees.

  Args:
    architecture: theirs.
    params: all arrays of the autoencoder, nested dicts; position tables too.
    disc_params: those of the discriminator, if it has one.
  """
  arrays = {
    architecture._prefix + k: np.asarray(jax.device_get(v))
    for k, v in flatten(params).items()
  }
  for name, value in flatten(disc_params or {}).items():
    arrays[_DISCRIMINATOR + name] = np.asarray(jax.device_get(value))
  return Weights(architecture, arrays)


def _differences(expected, found) -> list[str]:
  return [
    f"{name}: missing" for name in sorted(expected.keys() - found.keys())
  ] + [f"{name}: not known" for name in sorted(found.keys() - expected.keys())]
