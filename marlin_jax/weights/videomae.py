"""The original VideoMAE's .pth files.

Pretrained files hold encoder and decoder below 'model', fine-tuned files an
encoder and a classifier below 'module' or 'model'. Their input is
ImageNet-normalised, pretraining targets are normalised by token, and the head's
pixels are ordered (pt ph pw c). The file holds neither the position tables,
which VideoMAE computes in float64 like this project, nor the LayerNorm epsilon,
1e-6.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from marlin_jax.models.vit import sincos_positions
from marlin_jax.weights import name_tables, torch_files
from marlin_jax.weights.architecture import Architecture
from marlin_jax.weights.weights import (
  Weights,
  WeightsError,
  eps_notice,
  motion_notice,
)

_NORM_EPS = 1e-6
_MLP = ("mlp.fc1", "mlp.fc2")


def rules(architecture: Architecture, *, prefix: str, norm: str):
  """Returns the name table of a network.

  Args:
    architecture: architecture of the network.
    prefix: prefix of the encoder's array names, 'encoder.' or ''.
    norm: name of the final norm, 'norm' or, after the mean over tokens,
      'fc_norm'.
  """
  table = [
    *name_tables.patch_embedding(
      f"{prefix}patch_embed.proj", "encoder.patch_embedding", architecture
    ),
    *name_tables.fused_blocks(
      f"{prefix}blocks", "encoder.transformer", architecture.depth, *_MLP
    ),
    *name_tables.norm(f"{prefix}{norm}", "encoder.norm"),
  ]
  if architecture.has_decoder:
    table += [
      name_tables.transposed("encoder_to_decoder.weight", "enc_to_dec.kernel"),
      name_tables.batched("mask_token", "mask_token", 2),
      *name_tables.fused_blocks(
        "decoder.blocks", "decoder", architecture.dec_depth, *_MLP
      ),
      *name_tables.norm("decoder.norm", "dec_norm"),
      *name_tables.videomae_head("decoder.head", "head"),
    ]
  return table


def read(
  path: Path,
  *,
  num_heads: int = 0,
  dec_num_heads: int = 0,
  num_frames: int = 16,
  image_size: int = 224,
  drop_classifier: bool = False,
) -> Weights:
  """Reads a .pth file.

  Args:
    path: the file.
    num_heads: attention heads of the encoder; 0: those of the published network
      of this width.
    dec_num_heads: attention heads of the decoder; 0: likewise.
    num_frames: frames per clip, which the file does not hold.
    image_size: height and width of a frame in pixels, which the file does not
      hold.
    drop_classifier: ignore the classifier of a fine-tuned network, for which
      Weights have no place.

  Raises:
    WeightsError: see torch_files.load and name_tables.read.
  """
  theirs, source = load_state(path), str(path)
  if drop_classifier:
    theirs = {k: v for k, v in theirs.items() if not k.startswith("head.")}
  prefix = "encoder." if "encoder.patch_embed.proj.weight" in theirs else ""
  width, tubelet_size, patch_size = name_tables.patch_sizes(
    theirs, f"{prefix}patch_embed.proj.weight", source
  )
  architecture = Architecture(
    width=width,
    depth=name_tables.infer_depth(theirs, f"{prefix}blocks."),
    num_heads=name_tables.infer_heads(width, num_heads, "--num_heads", source),
    mlp_dim=name_tables.shape_of(
      theirs, f"{prefix}blocks.0.mlp.fc1.weight", source
    )[0],
    num_frames=num_frames,
    image_size=image_size,
    tubelet_size=tubelet_size,
    patch_size=patch_size,
    imagenet_input=True,
    norm_eps=_NORM_EPS,
  )
  if any(key.startswith("decoder.") for key in theirs):
    sizes = name_tables.decoder_sizes(
      theirs, "encoder_to_decoder", "mlp.fc1", dec_num_heads, source
    )
    architecture = dataclasses.replace(architecture, norm_pix=True, **sizes)
  norm = "fc_norm" if f"{prefix}fc_norm.weight" in theirs else "norm"
  table = rules(architecture, prefix=prefix, norm=norm)
  try:
    arrays = name_tables.read(table, theirs, source)
  except WeightsError as e:
    if "head.weight" in theirs:
      raise WeightsError(
        f"{e}\nhead.* is a classifier: python -m marlin_jax.convert "
        "--drop_classifier leaves it out"
      ) from e
    raise
  return Weights(architecture, arrays | position_tables(architecture), source)


def load_state(path: Path) -> dict:
  """Returns the arrays of a .pth file by their names in it.

  Raises:
    WeightsError: see torch_files.load and torch_files.to_numpy.
  """
  content = torch_files.load(path)
  for key in ("model", "module"):
    if isinstance(content, dict) and key in content:
      content = content[key]
      break
  return torch_files.to_numpy(content, path)


def position_tables(architecture: Architecture) -> dict:
  """Returns the position tables, which VideoMAE computes and never saves."""
  num_tokens = architecture.tubelets.num_tokens
  tables = {
    "encoder.positions": sincos_positions(num_tokens, architecture.width)
  }
  if architecture.has_decoder:
    tables["dec_positions"] = sincos_positions(
      num_tokens, architecture.dec_width
    )
  return tables


def write(weights: Weights, path: Path) -> list[str]:
  """Writes a pretraining checkpoint as VideoMAE's code loads it.

  Returns:
    Notices about what the format cannot store.

  Raises:
    WeightsError: PyTorch is missing, or the name does not end in .pth.
  """
  if path.suffix != ".pth":
    raise WeightsError(f"{path}: VideoMAE's files end in .pth")
  torch_files.import_torch()  # fails early
  notices = eps_notice(weights.architecture, _NORM_EPS, "VideoMAE's code")
  if not weights.architecture.imagenet_input:
    notices.append(
      "the encoder expects plain pixels; ImageNet's normalisation is folded "
      "into its patch embedding, because VideoMAE's code feeds normalised ones"
    )
    weights = weights.with_imagenet_input()
  if weights.architecture.has_decoder and not weights.architecture.norm_pix:
    notices.append(
      "the decoder predicts plain pixels, which the file cannot say: its "
      "readers expect pixels normalised by token"
    )
  architecture, arrays, dropped = drop_unsupported(weights)
  table = rules(architecture, prefix="encoder.", norm="norm")
  theirs = torch_files.to_torch(name_tables.write(table, arrays))
  torch_files.save({"model": theirs}, path)
  return notices + dropped


def drop_unsupported(
  weights: Weights,
) -> tuple[Architecture, dict[str, np.ndarray], list[str]]:
  """Drops what VideoMAE's formats cannot store: discriminator, position tables.

  Returns:
    The architecture, the arrays, and notices about what is dropped.
  """
  notices = motion_notice(weights.architecture)
  if weights.architecture.has_discriminator:
    notices.append(
      "the discriminator is dropped: the format has no place for it"
    )
    weights = weights.without_discriminator()
  computed = position_tables(weights.architecture)
  difference = max(
    float(abs(weights.arrays[name] - table).max())
    for name, table in computed.items()
  )
  if difference:
    notices.append(
      "the position tables are dropped: VideoMAE computes its own, which "
      f"differ by up to {difference:.1e}"
    )
  arrays = {
    name: array
    for name, array in weights.arrays.items()
    if name not in computed
  }
  return weights.architecture, arrays, notices
