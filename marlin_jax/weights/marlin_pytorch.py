"""The authors' format: .encoder.pt, .full.pt, Lightning's .ckpt, hub folders.

`marlin_pytorch.Marlin.from_file` opens these files. Input and targets are plain
pixels in [0, 1]. The files hold neither that nor the number of heads. The
authors' folders on the HuggingFace hub hold the same arrays as safetensors,
with sizes in config.json, whose model_type is 'marlin'.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from marlin_jax.models.vit import NORM_EPS
from marlin_jax.weights import name_tables, safetensors_folder, torch_files
from marlin_jax.weights.architecture import Architecture
from marlin_jax.weights.weights import (
  Weights,
  WeightsError,
  eps_notice,
  motion_notice,
)

_SUFFIXES = (".pt", ".ckpt")
# Module of the hub's class that holds the network.
_HUB_PREFIX = "marlin."
_MLP = ("mlp.layers.0.linear", "mlp.layers.1.linear")


def is_hub_folder(path: Path) -> bool:
  return safetensors_folder.read_config(path).get("model_type") == "marlin"


def rules(architecture: Architecture) -> list[name_tables.Rule]:
  """Returns the name table of a network."""
  table = [
    *name_tables.patch_embedding(
      "encoder.patch_embedding.projection",
      "encoder.patch_embedding",
      architecture,
    ),
    name_tables.batched("encoder.pos_embedding.emb", "encoder.positions", 1),
    *name_tables.fused_blocks(
      "encoder.blocks", "encoder.transformer", architecture.depth, *_MLP
    ),
    *name_tables.norm("encoder.norm", "encoder.norm"),
  ]
  if architecture.has_decoder:
    table += [
      name_tables.transposed("enc_dec_proj.weight", "enc_to_dec.kernel"),
      name_tables.batched("decoder.mask_token", "mask_token", 2),
      name_tables.batched("decoder.pos_embedding.emb", "dec_positions", 1),
      *name_tables.fused_blocks(
        "decoder.blocks", "decoder", architecture.dec_depth, *_MLP
      ),
      *name_tables.norm("decoder.norm", "dec_norm"),
      *name_tables.linear("decoder.head", "head"),
    ]
  if architecture.has_discriminator:
    for i, ours in enumerate(("hidden", "out")):
      table += name_tables.linear(
        f"discriminator.layers.{i}.linear", f"discriminator.{ours}"
      )
  return table


def read(
  path: Path,
  *,
  num_heads: int = 0,
  dec_num_heads: int = 0,
  image_size: int = 224,
) -> Weights:
  """Reads a .pt or .ckpt file, a .ckpt with its discriminator, or a folder.

  Args:
    path: the file, or a folder from the hub.
    num_heads: attention heads of the encoder; 0: as config.json of a folder, or
      those of the published network of this width.
    dec_num_heads: attention heads of the decoder; 0: likewise.
    image_size: height and width of a frame in pixels, which a file does not
      hold.

  Raises:
    WeightsError: see torch_files.load and name_tables.read.
  """
  theirs, source = load_state(path), str(path)
  if path.is_dir():
    config = safetensors_folder.read_config(path)
    num_heads = num_heads or config.get("encoder_num_heads") or 0
    dec_num_heads = dec_num_heads or config.get("decoder_num_heads") or 0
    image_size = config.get("img_size") or image_size
  width, tubelet_size, patch_size = name_tables.patch_sizes(
    theirs, "encoder.patch_embedding.projection.weight", source
  )
  num_tokens = name_tables.shape_of(
    theirs, "encoder.pos_embedding.emb", source
  )[1]
  architecture = Architecture(
    width=width,
    depth=name_tables.infer_depth(theirs, "encoder.blocks."),
    num_heads=name_tables.infer_heads(width, num_heads, "--num_heads", source),
    mlp_dim=name_tables.shape_of(
      theirs, "encoder.blocks.0.mlp.layers.0.linear.weight", source
    )[0],
    tubelet_size=tubelet_size,
    patch_size=patch_size,
    image_size=image_size,
    num_frames=_num_frames(
      num_tokens, tubelet_size, patch_size, image_size, source
    ),
  )
  if any(key.startswith("decoder.") for key in theirs):
    sizes = name_tables.decoder_sizes(
      theirs, "enc_dec_proj", "mlp.layers.0.linear", dec_num_heads, source
    )
    architecture = dataclasses.replace(architecture, **sizes)
  if any(key.startswith("discriminator.") for key in theirs):
    architecture = dataclasses.replace(
      architecture,
      disc_hidden=name_tables.shape_of(
        theirs, "discriminator.layers.0.linear.weight", source
      )[0],
    )
  return Weights(
    architecture, name_tables.read(rules(architecture), theirs, source), source
  )


def load_state(path: Path) -> dict[str, np.ndarray]:
  """Returns the arrays of a file or folder by their names in a .pt file.

  Raises:
    WeightsError: the file has another suffix; see also torch_files.load.
  """
  if path.is_dir():
    arrays = safetensors_folder.load_shards(path)
    return {
      name.removeprefix(_HUB_PREFIX): np.asarray(array, np.float32)
      for name, array in arrays.items()
    }
  if path.suffix not in _SUFFIXES:
    raise WeightsError(
      f"{path}: the authors' files end in {' or '.join(_SUFFIXES)}"
    )
  content = torch_files.load(path)
  if path.suffix == ".ckpt":
    if not isinstance(content, dict) or "state_dict" not in content:
      raise WeightsError(f"{path}: a Lightning checkpoint has a 'state_dict'")
    content = content["state_dict"]
  return torch_files.to_numpy(content, path)


def _num_frames(num_tokens, tubelet_size, patch_size, image_size, source):
  per_tubelet = (image_size // patch_size) ** 2
  if not per_tubelet or num_tokens % per_tubelet:
    raise WeightsError(
      f"{source}: {num_tokens} positions do not divide into frames of "
      f"{image_size}x{image_size} with {per_tubelet} patches: convert "
      "it with python -m marlin_jax.convert --image_size"
    )
  return num_tokens // per_tubelet * tubelet_size


def write(weights: Weights, path: Path) -> list[str]:
  """Writes a file that `marlin_pytorch.Marlin.from_file` opens.

  A name that ends in .encoder.pt gets the encoder alone, .pt encoder and
  decoder, .ckpt also the discriminator.

  Returns:
    Notices about what the format cannot store.

  Raises:
    WeightsError: the file has another suffix, or PyTorch is missing.
  """
  if path.suffix not in _SUFFIXES:
    raise WeightsError(
      f"{path}: the authors' files end in .encoder.pt, .full.pt or .ckpt"
    )
  torch_files.import_torch()  # fails early
  weights, notices = prepare(weights, path)
  theirs = torch_files.to_torch(
    name_tables.write(rules(weights.architecture), weights.arrays)
  )
  torch_files.save(
    {"state_dict": theirs} if path.suffix == ".ckpt" else theirs, path
  )
  return notices


def prepare(weights: Weights, path: Path) -> tuple[Weights, list[str]]:
  """Drops what a file cannot store.

  Args:
    weights: the network.
    path: name of the file, which decides what it holds; see `write`.

  Returns:
    The weights to write, and notices about what the format cannot store.
  """
  notices = eps_notice(weights.architecture, NORM_EPS, "the authors' code")
  if weights.architecture.imagenet_input:
    notices.append(
      "the encoder expects ImageNet-normalised pixels; the normalisation is "
      "folded into its patch embedding, because the authors' code feeds plain "
      "ones"
    )
    weights = weights.with_plain_input()
  if path.name.endswith(".encoder.pt"):
    return weights.encoder_only(), notices
  if weights.architecture.norm_pix:
    notices.append(
      "the decoder predicts pixels normalised by token, which the file cannot "
      "say and the authors' code does not expect"
    )
  notices += motion_notice(weights.architecture)
  if path.suffix == ".pt" and weights.architecture.has_discriminator:
    notices.append("the discriminator is dropped: only a .ckpt can hold it")
    weights = weights.without_discriminator()
  return weights, notices
