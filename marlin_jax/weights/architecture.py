"""The sizes of a network, and the modules and arrays that follow from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from marlin_jax.data.clip_geometry import Clip, Tubelets
from marlin_jax.models import stacking, vit
from marlin_jax.models.discriminator import Discriminator
from marlin_jax.models.mae import MAE, Encoder

# Field of Architecture -> key of a training configuration. The other field,
# norm_eps, is a constant there.
CONFIG_KEYS = {
  "num_frames": "data.num_frames",
  "stride": "data.stride",
  "image_size": "data.frame_size",
  "disc_hidden": "adv.hidden",
  "norm_pix": "target.norm_pix",
  "motion_weight": "target.motion_weight",
  "imagenet_input": "input.imagenet_norm",
  "tubelet_size": "model.tubelet_size",
  "patch_size": "model.patch_size",
  "width": "model.width",
  "depth": "model.depth",
  "num_heads": "model.num_heads",
  "mlp_dim": "model.mlp_dim",
  "dec_width": "model.dec_width",
  "dec_depth": "model.dec_depth",
  "dec_num_heads": "model.dec_num_heads",
  "dec_mlp_dim": "model.dec_mlp_dim",
}
# Fields that older checkpoints lack: they have the default value.
_ADDED = ("image_size", "patch_size", "motion_weight")
# Prefix of the discriminator's arrays in Weights and Architecture.shapes.
DISCRIMINATOR = "discriminator."
# Key of the networks of extra objectives among the arrays of a run's state.
OBJECTIVES = "objectives"
# Names of the position tables.
POSITIONS = ("encoder.positions", "dec_positions")


@dataclasses.dataclass(frozen=True)
class Architecture:
  """Everything that defines a network beside its arrays.

  Attributes:
    width, depth, num_heads, mlp_dim: size of the encoder.
    dec_width, dec_depth, dec_num_heads, dec_mlp_dim: size of the decoder; all 0
      for an encoder alone.
    disc_hidden: hidden units of the discriminator; 0 if there is none.
    num_frames: frames per clip.
    stride: source frames from one frame of a clip to the next.
    image_size: height and width of a frame in pixels.
    tubelet_size: frames of a token.
    patch_size: height and width of a token in pixels.
    norm_pix: the decoder predicts pixels normalised by token (VideoMAE).
    motion_weight: above 0, the decoder predicts a token's first frame, and the
      differences of the others from it (MAE-DFER); the share of their loss.
    imagenet_input: the encoder expects pixels normalised with ImageNet's
      statistics (VideoMAE) instead of plain pixels in [0, 1] (MARLIN).
    norm_eps: epsilon of every LayerNorm.
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
  motion_weight: float = 0.0
  imagenet_input: bool = False
  norm_eps: float = vit.NORM_EPS

  # --- configurations ---------------------------------------------------------

  @classmethod
  def from_config(cls, config: ConfigDict) -> Architecture:
    """Returns the architecture of a training configuration.

    Args:
      config: see configs/pretrain_b.py.
    """
    fields = {}
    for name, key in CONFIG_KEYS.items():
      section, leaf = key.split(".")
      fields[name] = config[section][leaf]
    return cls(**fields)

  @classmethod
  def from_settings(cls, settings: Mapping[str, Any]) -> Architecture:
    """Returns the architecture of a flat configuration.

    Args:
      settings: {"model.width": 768, ...}, as a run's checkpoint holds it.

    Raises:
      KeyError: one of CONFIG_KEYS is missing.
    """
    return cls(
      **{
        name: settings[key]
        for name, key in CONFIG_KEYS.items()
        if key in settings or name not in _ADDED
      }
    )

  @property
  def settings(self) -> dict[str, Any]:
    """The fields under their configuration keys: {"model.width": 768, ...}."""
    return {key: getattr(self, name) for name, key in CONFIG_KEYS.items()}

  # --- sizes ------------------------------------------------------------------

  @property
  def clip(self) -> Clip:
    return Clip(self.num_frames, self.stride)

  @property
  def tubelets(self) -> Tubelets:
    return Tubelets(
      self.num_frames, self.image_size, self.tubelet_size, self.patch_size
    )

  @property
  def encoder(self) -> vit.Size:
    return vit.Size(self.width, self.depth, self.num_heads, self.mlp_dim)

  @property
  def decoder(self) -> vit.Size:
    return vit.Size(
      self.dec_width, self.dec_depth, self.dec_num_heads, self.dec_mlp_dim
    )

  @property
  def has_decoder(self) -> bool:
    return self.dec_depth > 0

  @property
  def has_discriminator(self) -> bool:
    return self.disc_hidden > 0

  def problems(self) -> list[str]:
    """Returns a line for each size that is no multiple of its unit."""
    parts = [
      ("width", "num_heads"),
      ("num_frames", "tubelet_size"),
      ("image_size", "patch_size"),
    ]
    if self.has_decoder:
      parts.append(("dec_width", "dec_num_heads"))
    return [
      f"{name}={size}: expected a multiple of {unit}={divisor}"
      for name, unit in parts
      for size, divisor in [(getattr(self, name), getattr(self, unit))]
      if min(size, divisor) < 1 or size % divisor
    ]

  def without_decoder(self) -> Architecture:
    """Returns the encoder's architecture."""
    return dataclasses.replace(
      self,
      dec_width=0,
      dec_depth=0,
      dec_num_heads=0,
      dec_mlp_dim=0,
      disc_hidden=0,
      norm_pix=False,
      motion_weight=0.0,
    )

  # --- modules ----------------------------------------------------------------

  def make_autoencoder(
    self,
    *,
    rngs: nnx.Rngs | None = None,
    first_prediction: jax.Array | None = None,
    **execution,
  ) -> MAE | Encoder:
    """Draws an MAE, or an Encoder if there is no decoder.

    Args:
      rngs: draws the parameters; None: seed 0.
      first_prediction: see models.mae.MAE.
      **execution: `dtype`, `attention`, `scan`, `remat`; see vit.Execution.
    """
    shared = {
      "num_tokens": self.tubelets.num_tokens,
      "pixels": self.tubelets.pixels,
      "execution": vit.Execution(**execution),
      "rngs": rngs or nnx.Rngs(0),
      "norm_eps": self.norm_eps,
    }
    if not self.has_decoder:
      return Encoder(size=self.encoder, **shared)
    return MAE(
      encoder=self.encoder,
      decoder=self.decoder,
      first_prediction=first_prediction,
      **shared,
    )

  def make_discriminator(
    self, *, rngs: nnx.Rngs | None = None, dtype="float32"
  ) -> Discriminator:
    """Draws a discriminator.

    Args:
      rngs: draws the parameters; None: seed 0.
      dtype: dtype of the matmuls.
    """
    return Discriminator(
      pixels=self.tubelets.pixels,
      hidden=self.disc_hidden,
      rngs=rngs or nnx.Rngs(0),
      dtype=dtype,
    )

  # --- arrays -----------------------------------------------------------------

  @property
  def prefix(self) -> str:
    """Prefix of the autoencoder's arrays in Weights and `shapes`."""
    return "" if self.has_decoder else "encoder."

  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every array of the network by name."""
    modules = {self.prefix: self.make_autoencoder}
    if self.has_discriminator:
      modules[DISCRIMINATOR] = self.make_discriminator
    return {
      prefix + name: value.shape
      for prefix, make in modules.items()
      for name, value in shapes_of(make).items()
    }


def shapes_of(make) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of the arrays of `make()`'s module by name."""
  return jax.eval_shape(lambda: flatten(make()))


def flatten(module: nnx.Module | dict) -> dict[str, jax.Array]:
  """Returns the arrays of a module, or of nested dicts, by dotted name.

  Stacked blocks are unstacked: each block has its own names, 'a.blocks.0.b'.
  """
  if isinstance(module, nnx.Module):
    module = nnx.to_pure_dict(nnx.state(module))
  flat = flax.traverse_util.flatten_dict(stacking.unstack(module))
  return {".".join(map(str, path)): leaf for path, leaf in flat.items()}


def unflatten(arrays: Mapping[str, np.ndarray]) -> dict:
  """Returns nested dicts, with unstacked blocks; the inverse of `flatten`."""
  return flax.traverse_util.unflatten_dict(
    {
      tuple(int(key) if key.isdigit() else key for key in name.split(".")): x
      for name, x in arrays.items()
    }
  )
