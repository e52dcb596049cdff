"""The networks in PyTorch, on the state dict of a file.

`convert` checks its results against them: they use the names of the file and
are independent of the tables in name_tables. Inference only.

Axes: B clips, T frames, N tokens, M masked, D width, P pixels per token.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from marlin_jax.weights.architecture import Architecture


@dataclasses.dataclass(frozen=True)
class Names:
  """Names of a code base's state dict."""

  patch_embedding: str
  blocks: str
  norm: str
  hidden: str
  out: str
  enc_to_dec: str
  mask_token: str
  # VideoMAE's files have no position tables; they get the authors' names.
  positions: str = "encoder.pos_embedding.emb"
  dec_positions: str = "decoder.pos_embedding.emb"


AUTHORS = Names(
  "encoder.patch_embedding.projection",
  "encoder.blocks",
  "encoder.norm",
  "mlp.layers.0.linear",
  "mlp.layers.1.linear",
  "enc_dec_proj.weight",
  "decoder.mask_token",
)
VIDEOMAE = Names(
  "encoder.patch_embed.proj",
  "encoder.blocks",
  "encoder.norm",
  "mlp.fc1",
  "mlp.fc2",
  "encoder_to_decoder.weight",
  "mask_token",
)


def names_of(theirs: dict) -> Names:
  """Returns the names that a state dict uses."""
  if f"{AUTHORS.patch_embedding}.weight" in theirs:
    return AUTHORS
  if f"{VIDEOMAE.patch_embedding}.weight" in theirs:
    return VIDEOMAE
  # A fine-tuned VideoMAE: an encoder without prefix.
  norm = "fc_norm" if "fc_norm.weight" in theirs else "norm"
  return dataclasses.replace(
    VIDEOMAE, patch_embedding="patch_embed.proj", blocks="blocks", norm=norm
  )


class TorchNetwork:
  """The autoencoder of a state dict.

  Args:
    theirs: the file's arrays by their names there.
    architecture: architecture of the network, which the file does not store
      completely.
    tables: `encoder.positions` and `dec_positions`, float32 (N, D), for files
      without position tables.
  """

  def __init__(
    self,
    theirs: dict[str, np.ndarray],
    architecture: Architecture,
    tables: dict[str, np.ndarray],
  ):
    import torch

    self._torch, self._functional = torch, torch.nn.functional
    self._architecture = architecture
    self._names = names_of(theirs)
    self._state = {
      k: torch.from_numpy(np.asarray(v)) for k, v in theirs.items()
    }
    for ours, name in (
      ("encoder.positions", AUTHORS.positions),
      ("dec_positions", AUTHORS.dec_positions),
    ):
      if ours in tables:
        self._state.setdefault(name, torch.from_numpy(tables[ours])[None])

  def features(self, video: np.ndarray) -> np.ndarray:
    """Returns the normalised feature of every token.

    Args:
      video: float32 (B, T, H, W, 3), normalised as the network expects.

    Returns:
      float32 (B, N, D).
    """
    with self._torch.no_grad():
      return self._encode(self._embed(video)).numpy()

  def predictions(self, video: np.ndarray, visible: np.ndarray) -> np.ndarray:
    """Returns the decoder's predictions of the masked tokens.

    Args:
      video: see `features`.
      visible: bool (N,), the same for every clip.

    Returns:
      float32 (B, M, P), tokens ascending, pixels in the order of the file.
    """
    names, state = self._names, self._state
    with self._torch.no_grad():
      shown = self._torch.from_numpy(visible)
      x = self._encode(self._embed(video)[:, shown])
      x = self._functional.linear(x, state[names.enc_to_dec])
      positions = state[AUTHORS.dec_positions]
      masked = state[names.mask_token] + positions[:, ~shown]
      x = self._torch.cat(
        [x + positions[:, shown], masked.expand(len(x), -1, -1)], dim=1
      )
      x = self._blocks(
        x,
        "decoder.blocks",
        self._architecture.dec_depth,
        self._architecture.dec_num_heads,
      )
      x = self._norm(x[:, visible.sum() :], "decoder.norm")
      return self._linear(x, "decoder.head").numpy()

  def _embed(self, video):
    name = self._names.patch_embedding
    weight, bias = self._state[f"{name}.weight"], self._state[f"{name}.bias"]
    x = self._torch.from_numpy(video).permute(0, 4, 1, 2, 3)  # (B, C, T, H, W)
    x = self._functional.conv3d(x, weight, bias, stride=weight.shape[2:])
    return x.flatten(2).transpose(1, 2) + self._state[AUTHORS.positions]

  def _encode(self, x):
    architecture = self._architecture
    x = self._blocks(
      x, self._names.blocks, architecture.depth, architecture.num_heads
    )
    return self._norm(x, self._names.norm)

  def _blocks(self, x, prefix, depth, num_heads):
    names, functional = self._names, self._functional
    for i in range(depth):
      block = f"{prefix}.{i}"
      y = self._norm(x, f"{block}.norm1")
      x = x + self._attention(y, f"{block}.attn", num_heads)
      y = self._linear(
        self._norm(x, f"{block}.norm2"), f"{block}.{names.hidden}"
      )
      x = x + self._linear(functional.gelu(y), f"{block}.{names.out}")
    return x

  def _attention(self, x, name, num_heads):
    q_bias = self._state[f"{name}.q_bias"]
    v_bias = self._state[f"{name}.v_bias"]
    bias = self._torch.cat([q_bias, self._torch.zeros_like(v_bias), v_bias])
    qkv = self._functional.linear(x, self._state[f"{name}.qkv.weight"], bias)
    qkv = qkv.unflatten(-1, (3, num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, D / H) each
    y = self._functional.scaled_dot_product_attention(q, k, v)
    return self._linear(y.transpose(1, 2).flatten(2), f"{name}.proj")

  def _linear(self, x, name):
    weight, bias = self._state[f"{name}.weight"], self._state[f"{name}.bias"]
    return self._functional.linear(x, weight, bias)

  def _norm(self, x, name):
    weight, bias = self._state[f"{name}.weight"], self._state[f"{name}.bias"]
    return self._functional.layer_norm(
      x, weight.shape, weight, bias, self._architecture.norm_eps
    )
