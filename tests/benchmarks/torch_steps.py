"""Training steps in PyTorch: the authors', and an optimised one.

Both use the networks of marlin-pytorch. That package has no discriminator; here
it has two layers, as in the paper.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from marlin_jax.weights.weights import Weights
from tests.support import authors

ADVERSARIAL_WEIGHT = 0.01
OPTIMIZER = {
  "lr": 1e-4,
  "betas": (0.9, 0.95),
  "eps": 1e-8,
  "weight_decay": 0.0,
}


def _discriminator(weights: Weights, device: str) -> nn.Module:
  architecture = weights.architecture
  return nn.Sequential(
    nn.Linear(architecture.tubelets.pixels, architecture.disc_hidden),
    nn.LeakyReLU(0.01),
    nn.Linear(architecture.disc_hidden, 1),
  ).to(device)


def _tokens(video: torch.Tensor) -> torch.Tensor:
  """(B, C, T, H, W) -> (B, N, P), P ordered c pt ph pw."""
  batch_size, colours, frames, height, width = video.shape
  x = video.reshape(
    batch_size, colours, frames // 2, 2, height // 16, 16, width // 16, 16
  )
  return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(
    batch_size, -1, colours * 2 * 16 * 16
  )


def _device() -> str:
  return "cuda" if torch.cuda.is_available() else "cpu"


def authors_step(
  weights: Weights, video: np.ndarray, visible: np.ndarray
) -> Callable[[], None]:
  """Returns the authors' step: one full forward per player, in float32.

  The backward pass of the discriminator's loss also runs through the
  autoencoder; that gradient is discarded.

  Args:
    weights: initial weights.
    video: uint8 (B, T, H, W, 3).
    visible: int (B, V), indices of the tokens that the encoder sees.
  """
  device = _device()
  model = authors.network(weights).train().to(device)
  judge = _discriminator(weights, device)
  optimizer, disc_optimizer = (
    torch.optim.AdamW(m.parameters(), **OPTIMIZER) for m in (model, judge)
  )
  pixels = authors.clips(video.astype(np.float32) / 255).to(device)
  mask = torch.zeros(len(video), weights.architecture.tubelets.num_tokens)
  mask = mask.scatter(1, torch.from_numpy(visible), 1).bool().to(device)

  def step():
    target = _tokens(pixels)[~mask].view(len(pixels), -1, 1536)
    pred = model(pixels, mask)
    loss = judge(pred).mean() - judge(target).mean()
    disc_optimizer.zero_grad()
    loss.backward()
    disc_optimizer.step()
    pred = model(pixels, mask)
    loss = F.mse_loss(pred, target) - ADVERSARIAL_WEIGHT * judge(pred).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()

  return step


class _Lean(nn.Module):
  """marlin-pytorch's autoencoder on token indices, which compiles as one graph.

  Only visible tokens are embedded; attention is PyTorch's fused attention.
  """

  def __init__(self, weights: Weights):
    super().__init__()
    self.whole = authors.with_fused_attention(authors.network(weights)).train()

  def forward(self, tokens, visible, masked):
    encoder, decoder = self.whole.encoder, self.whole.decoder
    projection = encoder.patch_embedding.projection
    x = F.linear(
      _pick(tokens, visible), projection.weight.flatten(1), projection.bias
    )
    x = x + encoder.pos_embedding.emb[0][visible]
    x = self.whole.enc_dec_proj(encoder.forward_features(x))
    positions = decoder.pos_embedding.emb[0]
    hidden = decoder.mask_token + positions[masked]
    x = torch.cat([x + positions[visible], hidden], dim=1)
    return decoder.forward_features(x, masked.shape[1])


def _pick(tokens, indices):
  return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


def best_step(
  weights: Weights, video: np.ndarray, visible: np.ndarray
) -> Callable[[], None]:
  """Returns a step with one forward pass and PyTorch's fast paths.

  These are fused attention, a fused optimiser, torch.compile, and bfloat16 on
  GPU.

  Args:
    weights: initial weights.
    video: uint8 (B, T, H, W, 3).
    visible: int (B, V), indices of the tokens that the encoder sees.
  """
  device = _device()
  model = torch.compile(_Lean(weights).to(device))
  judge = torch.compile(_discriminator(weights, device))
  optimizer, disc_optimizer = (
    torch.optim.AdamW(m.parameters(), fused=True, **OPTIMIZER)
    for m in (model, judge)
  )
  trained = [p for p in model.parameters() if p.requires_grad]
  num_tokens = weights.architecture.tubelets.num_tokens
  masked = np.stack([np.setdiff1d(np.arange(num_tokens), v) for v in visible])
  frames = authors.clips(video).to(device)
  visible, masked = (torch.from_numpy(x).to(device) for x in (visible, masked))
  precision = (
    torch.autocast("cuda", torch.bfloat16)
    if device == "cuda"
    else contextlib.nullcontext()
  )

  def step():
    tokens = _tokens(frames).float() / 255
    target = _pick(tokens, masked)
    with precision:
      pred = model(tokens, visible, masked)
      loss = judge(pred.detach()).mean() - judge(target).mean()
    loss.backward()
    disc_optimizer.step()
    disc_optimizer.zero_grad()
    with precision:
      score = judge(pred).mean()
    loss = F.mse_loss(pred.float(), target) - ADVERSARIAL_WEIGHT * score
    loss.backward(inputs=trained)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()

  return step
