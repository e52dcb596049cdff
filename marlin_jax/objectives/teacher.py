"""Latent targets: the decoder predicts a teacher's features of masked tokens.

The teacher sees the whole clip; the student its visible tokens. Each token's
features of the teacher are normalised to mean 0 and variance 1 over their
width, and the loss is the mean absolute error, as in V-JEPA (Bardes et al.
2024; V-JEPA 2, Assran et al. 2025). The teacher is
- a finished encoder, which stays as it is: SALT (Li et al. 2025, arXiv
  2509.24317), whose teacher reconstructed pixels; or a larger encoder that is
  distilled into a smaller one;
- or the moving average of the run's own weights, as in V-JEPA. Then nothing in
  the loss keeps features of all inputs from becoming equal: see
  `collapse.spread`.

Axes: B clips, N tokens, M masked, V visible, D width of the teacher, L layers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
from flax import nnx

from marlin_jax.data.clip_geometry import imagenet_normalised
from marlin_jax.models import flops, partition, vit
from marlin_jax.models.mae import Encoder, gather_tokens
from marlin_jax.objectives import collapse, table
from marlin_jax.objectives.objective import Objective, Run
from marlin_jax.training.configuration import ConfigError
from marlin_jax.weights import formats
from marlin_jax.weights.architecture import Architecture
from marlin_jax.weights.weights import Weights, encoder_sha256

# float32 arrays of a clip's targets that the loss keeps: prediction, target,
# their difference and its gradient.
_TARGET_ARRAYS = 4


class Teacher(Objective):
  """Latent targets of a teacher; see the module."""

  name = "teacher"

  def __init__(self, run: Run, weights: Weights | None = None):
    """Reads the teacher.

    Args:
      run: the run.
      weights: the teacher, if it has been read before.

    Raises:
      WeightsError: there are no such weights.
      ConfigError: the teacher does not fit the run.
    """
    super().__init__(run)
    path = self.settings.path
    self.reads_average = path == "ema"
    if not weights and not self.reads_average:
      weights = formats.read(formats.resolve(path)).encoder_only()
    self._weights = weights
    self._check_tokens()
    depth = self._architecture.depth
    self._layers = table.layer_numbers(self.settings.layers) or [depth]
    if self._layers[-1] > depth:
      raise ConfigError(
        f"teacher.layers={self.settings.layers!r}, but the teacher "
        f"({self._source}) has {depth} blocks: expected at most {depth}"
      )

  def at_stage(self, run):
    return type(self)(run, self._weights)

  def _check_tokens(self) -> None:
    """Raises ConfigError if the teacher cannot see the run's tokens.

    Clips may be smaller than the teacher's, and frames of another size.
    """
    ours, theirs = self.run.architecture.tubelets, self._architecture.tubelets
    differences = [
      f"  {name}: {getattr(ours, name)}, of the teacher {getattr(theirs, name)}"
      for name in ("tubelet_size", "patch_size", "num_frames")
      if getattr(ours, name) != getattr(theirs, name)
      and (name != "num_frames" or ours.num_frames > theirs.num_frames)
    ]
    if differences:
      raise ConfigError(
        f"teacher.path: {self._source} and the run cut clips into other "
        "tokens:\n" + "\n".join(differences) + "\nTrain with the teacher's "
        "sizes (config.model) and at most its frames (config.data), or take "
        "another teacher"
      )

  @functools.cached_property
  def _architecture(self) -> Architecture:
    if self._weights is None:
      return self.run.architecture.without_decoder()
    return self._weights.architecture

  @property
  def _source(self) -> str:
    if self._weights is None:
      return "the average of the run's weights"
    return self._weights.source

  @property
  def _width(self) -> int:
    return self._architecture.width * len(self._layers)

  # --- arrays -----------------------------------------------------------------

  def networks(self, rngs):
    """Draws the head that maps decoder features to targets."""
    head = vit.dense(
      self.run.architecture.dec_width,
      self._width,
      rngs,
      self.run.execution.dtype,
    )
    return nnx.Dict(head=head)

  @functools.cached_property
  def _encoder(self) -> nnx.GraphDef:
    """Structure of the teacher. No backward pass runs, so none is prepared."""
    execution = dataclasses.replace(self.run.execution, remat="none")

    def make():
      return self._architecture.make_autoencoder(**vars(execution))

    return vit.split_model(nnx.eval_shape(make))[0]

  @functools.cached_property
  def frozen(self):
    if self._weights is None:
      return {}
    # Taken in the input convention of the run.
    if self.run.architecture.imagenet_input:
      weights = self._weights.with_imagenet_input()
    else:
      weights = self._weights.with_plain_input()
    encoder = weights.autoencoder(**vars(self.run.execution))
    _, params, fixed = vit.split_model(encoder)
    # Moved to the host: a device keeps its shards alone.
    return jax.device_get(
      {"params": {"encoder": params}, "fixed": {"encoder": fixed}}
    )

  @property
  def num_heads(self):
    return {"params/encoder": self._architecture.num_heads}

  @functools.cached_property
  def identity(self):
    if self._weights is None:
      return {}
    return {"teacher.sha256": encoder_sha256(self._weights)}

  # --- loss -------------------------------------------------------------------

  def loss(self, own, frozen, forward, batch):
    params, fixed = (frozen[part]["encoder"] for part in ("params", "fixed"))
    # A token keeps its place in clips of another size, as in `init_from`.
    grids = (
      x.tubelets.grid for x in (self._architecture, self.run.architecture)
    )
    tables = {"positions": vit.positions_at(fixed["positions"], *grids)}
    encoder = nnx.merge(self._encoder, partition.weights(params), tables)
    targets = self.targets(encoder, batch["video"], batch["masked"])
    predicted = own["head"](forward.prediction.features).astype(jnp.float32)
    loss = jnp.abs(predicted - targets).mean()
    return loss, collapse.spread(forward.encoded)

  def targets(
    self, encoder: Encoder, video: jax.Array, masked: jax.Array
  ) -> jax.Array:
    """Returns the teacher's features of masked tokens.

    Args:
      encoder: the teacher.
      video: uint8 (B, T, H, W, 3).
      masked: int (B, M), token numbers.

    Returns:
      float32 (B, M, L * D), layer by layer; over each layer's D values the mean
      is 0 and the variance 1.
    """
    tubelets = self.run.architecture.tubelets
    patches = tubelets.patchify(video).astype(jnp.float32) / 255
    if self.run.architecture.imagenet_input:
      patches = imagenet_normalised(patches)
    x, found = encoder.embed(patches), []
    for begin, end in itertools.pairwise((0, *self._layers)):
      x = encoder.transformer.part(x, begin, end)
      tokens = gather_tokens(x, masked).astype(jnp.float32)
      if end == self._architecture.depth:
        tokens = encoder.norm(tokens)
      found.append(jax.nn.standardize(tokens, epsilon=vit.NORM_EPS))
    return jax.lax.stop_gradient(jnp.concatenate(found, -1))

  # --- cost -------------------------------------------------------------------

  @property
  def flops(self) -> float:
    run, architecture = self.run, self._architecture
    tokens = run.architecture.tubelets.num_tokens
    size = dataclasses.replace(architecture.encoder, depth=self._layers[-1])
    embed = 2 * tokens * architecture.tubelets.pixels * architecture.width
    head = 2 * run.num_masked * run.architecture.dec_width * self._width
    teacher = embed + flops.StackFlops(size, tokens, tokens).forward
    return teacher + 3 * head

  @property
  def clip_bytes(self) -> int:
    return 4 * _TARGET_ARRAYS * self.run.num_masked * self._width

  def describe(self) -> str:
    sizes = self._architecture
    return (
      f"{self._source}, width {sizes.width}, depth {sizes.depth}; predicted: "
      f"block {', '.join(map(str, self._layers))}"
    )
