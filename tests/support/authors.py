"""The authors' network from PyPI, for comparison; tests only (CC BY-NC)."""

import importlib
import sys
import types

import numpy as np
import pytest

from marlin_jax.weights import marlin_pytorch, name_tables, torch_files
from marlin_jax.weights.weights import Weights


def network(weights: Weights):
  """Returns marlin_pytorch's Marlin with these weights, float32 on the CPU."""
  pytest.importorskip("torch", reason="the test extra has it")
  architecture = weights.architecture
  model = package().Marlin(
    img_size=architecture.image_size,
    patch_size=architecture.patch_size,
    n_frames=architecture.num_frames,
    encoder_embed_dim=architecture.width,
    encoder_depth=architecture.depth,
    encoder_num_heads=architecture.num_heads,
    decoder_embed_dim=architecture.dec_width,
    decoder_depth=architecture.dec_depth,
    decoder_num_heads=architecture.dec_num_heads,
    mlp_ratio=architecture.mlp_dim / architecture.width,
    qkv_bias=True,
    qk_scale=None,
    drop_rate=0.0,
    attn_drop_rate=0.0,
    norm_layer="LayerNorm",
    init_values=0.0,
    tubelet_size=architecture.tubelet_size,
    as_feature_extractor=not architecture.has_decoder,
  )
  weights = weights.without_discriminator()
  theirs = name_tables.write(
    marlin_pytorch.rules(weights.architecture), weights.arrays
  )
  model.load_state_dict(torch_files.to_torch(theirs))
  return model.eval()


def package():
  """Imports the package, whose video reader imports torchvision.

  A CPU build of torchvision is not available everywhere. A placeholder takes
  its place during the import only, so that no other package sees it.
  """
  placeholder = "torchvision" not in sys.modules
  if placeholder:
    try:
      importlib.import_module("torchvision")
      placeholder = False
    except ImportError:
      sys.modules["torchvision"] = types.ModuleType("torchvision")
  try:
    return importlib.import_module("marlin_pytorch.model.marlin")
  finally:
    if placeholder:
      del sys.modules["torchvision"]


def clips(x: np.ndarray):
  """Converts (B, T, H, W, C) to torch (B, C, T, H, W)."""
  import torch

  return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 4, 1, 2, 3)))


def open_file(name: str, path):
  """Opens a file with marlin_pytorch's own Marlin.from_file."""
  return package().Marlin.from_file(name, str(path))


def without_ffprobe():
  """Replaces the package's frame count if the ffprobe program is missing."""
  import shutil

  import av
  import ffmpeg

  if shutil.which("ffprobe"):
    return

  def probe(path):
    with av.open(path) as container:
      return {"streams": [{"nb_frames": str(container.streams[0].frames)}]}

  ffmpeg.probe = probe


def with_fused_attention(model):
  """Replaces a model's attention by scaled_dot_product_attention."""
  import torch
  from torch.nn import functional as F

  def forward(self, x):
    bias = torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias])
    qkv = F.linear(x, self.qkv.weight, bias)
    qkv = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(*qkv)
    return self.proj(y.transpose(1, 2).flatten(2))

  for module in model.modules():
    if hasattr(module, "qkv"):
      module.forward = forward.__get__(module)
  return model
