"""Contrast: clips of one person are alike, and unlike those of others.

The loss is InfoNCE (van den Oord et al. 2018, arXiv 1807.03748) between the
clips of a batch, in both directions of each pair, as NT-Xent of SimCLR (Chen et
al. 2020, ICML), on the mean of the visible tokens, as CAN (Mishra et al. 2022,
arXiv 2210.16870), which joins it to a masked autoencoder of pictures. Its pairs
are two views of one picture; here they are clips of one track (as of one video
in CVRL, Qian et al. 2021, CVPR) or of different videos of a person, drawn in a
row by `data.draws_per_unit` and `data.clips_per_record`.

The batch is that of all devices. With microbatches it is one of them: clips of
other microbatches are no negatives.

Axes: B clips, V visible tokens, D encoder width, E `contrast.dim`.
"""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
from flax import nnx

from marlin_jax.models import vit
from marlin_jax.objectives import collapse
from marlin_jax.objectives.objective import Objective
from marlin_jax.training.configuration import ConfigError

# float32 rows of B values that a clip keeps for the backward pass.
_ROWS = 6


class Contrast(Objective):
  """Contrast between clips of people; see the module."""

  name = "contrast"
  fields = types.MappingProxyType(
    {"_subject": jax.ShapeDtypeStruct((), jnp.int32)}
  )

  @property
  def num_together(self) -> int:
    data = self.run.config.data
    return data.clips_per_record * data.draws_per_unit

  @property
  def least_clips(self) -> int:
    """Those of two people."""
    return 2 * self.num_together

  def check_data(self, datasets, clips_per_epoch):
    if clips_per_epoch < 2:
      data = self.run.config.data
      raise ConfigError(
        f"contrast.weight={self.weight}: expected videos of at least two "
        f"people in {data.path}, which has one {data.sample_by}"
      )

  def networks(self, rngs):
    """Draws the projection: two layers, dropped after the training."""
    width, dtype = self.run.architecture.width, self.run.execution.dtype
    return nnx.Dict(
      hidden=vit.dense(width, width, rngs, dtype),
      head=vit.dense(width, self.settings.dim, rngs, dtype),
    )

  def loss(self, own, frozen, forward, batch):
    del frozen
    pooled = forward.encoded.mean(1)
    projected = own["head"](jax.nn.relu(own["hidden"](pooled)))
    loss, accuracy = info_nce(
      projected.astype(jnp.float32),
      batch["_subject"],
      self.num_together,
      self.settings.temperature,
    )
    return loss, {"accuracy": accuracy, **collapse.spread(pooled)}

  @property
  def flops(self) -> float:
    width, dim = self.run.architecture.width, self.settings.dim
    products = width * width + width * dim + self.run.batch_size * dim
    return 3 * 2 * products

  @property
  def clip_bytes(self) -> int:
    width = self.run.architecture.width
    return 4 * (_ROWS * self.run.batch_size + 4 * width)

  def describe(self) -> str:
    return (
      f"{self.num_together} clips of a person in a row, temperature "
      f"{self.settings.temperature}"
    )


def info_nce(
  projected: jax.Array,
  subject: jax.Array,
  num_together: int,
  temperature: float,
) -> tuple[jax.Array, jax.Array]:
  """Returns the contrastive loss, and how often a clip finds its person.

  A clip's positives are those of its group with the same subject: a clip that
  replaces an unreadable one may be of another. Its negatives are the clips of
  other subjects. Clips of its subject in other groups are neither.

  Args:
    projected: float32 (B, E), of any length.
    subject: int (B,), number of the person in each clip.
    num_together: clips of a group; groups follow each other in the batch.
    temperature: divides the cosines.

  Returns:
    The mean over clips with a positive, and over their positives, of
    -log(exp(s) / (exp(s) + sum of exp(s') of the negatives)), where s is the
    cosine over the temperature; and the share of these clips whose most similar
    clip, of positives and negatives, is a positive. float32 scalars; 0 if no
    clip has a positive.
  """
  norm = jnp.linalg.norm(projected, axis=-1, keepdims=True)
  unit = projected / jnp.maximum(norm, 1e-6)
  cosines = jnp.matmul(unit, unit.T, precision=jax.lax.Precision.HIGHEST)
  similarity = cosines / temperature
  rows = jnp.arange(len(projected))
  group = rows // num_together
  is_same = subject[:, None] == subject
  is_positive = is_same & (group[:, None] == group) & (rows[:, None] != rows)
  # Finite, so that the gradient of a row without negatives is 0 and not NaN.
  negatives = jnp.where(is_same, -1e9, similarity)
  others = jax.nn.logsumexp(negatives, axis=1, keepdims=True)
  losses = jax.nn.softplus(others - similarity)
  num_positives = is_positive.sum(1)
  of_clip = jnp.where(is_positive, losses, 0).sum(1)
  of_clip /= jnp.maximum(num_positives, 1)
  nearest = jnp.where(is_positive, similarity, -jnp.inf).max(1)
  is_found = nearest > negatives.max(1)
  num_clips = jnp.maximum((num_positives > 0).sum(), 1)
  return of_clip.sum() / num_clips, is_found.sum() / num_clips
