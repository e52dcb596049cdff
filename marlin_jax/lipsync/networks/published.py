"""Published weights of lip-sync networks.

Wav2Lip's (github.com/Rudrabha/Wav2Lip, table in its README) are
lipsync_expert.pth, wav2lip.pth, wav2lip_gan.pth and visual_quality_disc.pth.
Each is a dict whose 'state_dict' holds the arrays, their names with or without
the prefix 'module.'. SyncNet's (github.com/joonson/syncnet_python) are in
syncnet_v2.model, a state dict.

Wav2Lip's images are BGR, as OpenCV reads them; this project's are RGB. The
tables reverse the channels of the first layers, and of the generator's last, so
that the networks here take and return RGB. SyncNet stays BGR.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from marlin_jax.lipsync.networks.convolutions import TransposedConvolution
from marlin_jax.lipsync.networks.quality_discriminator import (
  STAGES,
  QualityDiscriminator,
)
from marlin_jax.lipsync.networks.sync_expert import SyncExpert
from marlin_jax.lipsync.networks.syncnet import SyncNet
from marlin_jax.lipsync.networks.wav2lip import Wav2Lip
from marlin_jax.weights import name_tables, torch_files
from marlin_jax.weights.name_tables import Rule
from marlin_jax.weights.weights import WeightsError


@dataclasses.dataclass(frozen=True)
class Published:
  """A network with published weights.

  Attributes:
    description: network and file names, for messages.
    marker: name of an array that none of the other networks has.
    make: returns the network with random weights.
    rules: returns the name table of a network; see weights.name_tables.
  """

  description: str
  marker: str
  make: Callable[[], nnx.Module]
  rules: Callable[[nnx.Module], list[Rule]]


def read(published: Published, path: str | Path) -> nnx.Module:
  """Reads published weights.

  Args:
    published: the expected network: EXPERT, WAV2LIP, QUALITY_DISCRIMINATOR or
      SYNCNET.
    path: file with the published weights.

  Returns:
    The network in evaluation mode.

  Raises:
    WeightsError: there is no such file, it cannot be read as weights, or it
      holds another network.
  """
  path = Path(path).expanduser()
  if not path.is_file():
    raise WeightsError(
      f"no {published.description} at {path}: there is no such file"
    )
  state_dict = _load(path)
  for other in PUBLISHED:
    if other is not published and other.marker in state_dict:
      raise WeightsError(
        f"{path} is {other.description}, expected {published.description}"
      )
  network = nnx.eval_shape(published.make)
  rules = published.rules(network)
  arrays = name_tables.read(rules, state_dict, str(path))
  return _fill(network, rules, arrays, path)


def named_variables(network: nnx.Module) -> dict[str, nnx.Variable]:
  """Returns variables by path, such as 'face_layers.0.norm.scale'."""
  return {
    ".".join(map(str, path)): variable
    for path, variable in nnx.to_flat_state(nnx.state(network))
  }


# --- Name tables --------------------------------------------------------------


def _expert_rules(network: SyncExpert) -> list[Rule]:
  rules = [
    *_sequence("face_encoder", "face_layers", network.face_layers),
    *_sequence("audio_encoder", "sound_layers", network.sound_layers),
  ]
  return _with_rgb_input(rules, "face_layers.0.convolution.kernel")


def _wav2lip_rules(network: Wav2Lip) -> list[Rule]:
  rules = _sequence("audio_encoder", "sound_layers", network.sound_layers)
  for theirs, ours in (
    ("face_encoder_blocks", "face_stages"),
    ("face_decoder_blocks", "decoder_stages"),
  ):
    for i, stage in enumerate(getattr(network, ours)):
      rules += _sequence(f"{theirs}.{i}", f"{ours}.{i}", stage)
  rules += _layer("output_block.0.conv_block", "output.hidden")
  rules = _with_rgb_input(rules, "face_stages.0.0.convolution.kernel")
  kernel, bias = _convolution("output_block.1", "output.colours")
  return [
    *rules,
    dataclasses.replace(
      kernel,
      read=lambda x: kernel.read(x[::-1]),
      write=lambda x: kernel.write(x)[::-1],
    ),
    dataclasses.replace(
      bias, read=lambda x: (x[::-1],), write=lambda x: x[::-1]
    ),
  ]


def _discriminator_rules(network: QualityDiscriminator) -> list[Rule]:
  places = [(i, j) for i, stage in enumerate(STAGES) for j in range(len(stage))]
  rules = []
  for number, (i, j) in enumerate(places):
    rules += _convolution(
      f"face_encoder_blocks.{i}.{j}.conv_block.0",
      f"layers.{number}.convolution",
    )
  rules += _convolution("binary_pred.0", "logit")
  return _with_rgb_input(rules, "layers.0.convolution.kernel")


def _syncnet_rules(network: SyncNet) -> list[Rule]:
  # Convolution, norm, ReLU and pooling each have a number in nn.Sequential.
  numbers = (0, 4, 8, 11, 14, 18)
  rules = []
  for theirs, ours in (
    ("netcnnaud", "sound_layers"),
    ("netcnnlip", "face_layers"),
  ):
    for i, number in enumerate(numbers):
      rules += [
        *_convolution(f"{theirs}.{number}", f"{ours}.{i}.convolution"),
        *_batch_norm(f"{theirs}.{number + 1}", f"{ours}.{i}.norm"),
      ]
  for theirs, ours in (("netfcaud", "sound_out"), ("netfclip", "face_out")):
    rules += [
      *name_tables.linear(f"{theirs}.0", f"{ours}.hidden"),
      *_batch_norm(f"{theirs}.1", f"{ours}.norm"),
      *name_tables.linear(f"{theirs}.3", f"{ours}.linear"),
    ]
  return rules


EXPERT = Published(
  "Wav2Lip's expert (lipsync_expert.pth)",
  "face_encoder.0.conv_block.0.weight",
  lambda: SyncExpert(5, rngs=nnx.Rngs(0)),
  _expert_rules,
)
WAV2LIP = Published(
  "Wav2Lip's generator (wav2lip.pth, wav2lip_gan.pth)",
  "output_block.1.weight",
  lambda: Wav2Lip(rngs=nnx.Rngs(0)),
  _wav2lip_rules,
)
QUALITY_DISCRIMINATOR = Published(
  "Wav2Lip's discriminator (visual_quality_disc.pth)",
  "binary_pred.0.weight",
  lambda: QualityDiscriminator(rngs=nnx.Rngs(0)),
  _discriminator_rules,
)
SYNCNET = Published(
  "SyncNet (syncnet_v2.model)",
  "netcnnlip.0.weight",
  lambda: SyncNet(rngs=nnx.Rngs(0)),
  _syncnet_rules,
)
PUBLISHED = (EXPERT, WAV2LIP, QUALITY_DISCRIMINATOR, SYNCNET)


# --- Rules of layers ----------------------------------------------------------


def _sequence(theirs: str, ours: str, layers: Iterable) -> list[Rule]:
  rules = []
  for i, layer in enumerate(layers):
    rules += _layer(
      f"{theirs}.{i}.conv_block",
      f"{ours}.{i}",
      transposed=isinstance(layer, TransposedConvolution),
    )
  return rules


def _layer(theirs: str, ours: str, *, transposed: bool = False) -> list[Rule]:
  return [
    *_convolution(f"{theirs}.0", f"{ours}.convolution", transposed=transposed),
    *_batch_norm(f"{theirs}.1", f"{ours}.norm"),
  ]


def _convolution(
  theirs: str, ours: str, *, transposed: bool = False
) -> list[Rule]:
  """Returns rules of a convolution.

  PyTorch stores kernels as (out, in, *spatial), nnx as (*spatial, in, out).
  PyTorch stores those of transposed convolutions as (in, out, *spatial) and
  flipped, like the convolution whose gradient they compute.
  """

  def read(x):
    spatial = tuple(range(2, x.ndim))
    if transposed:
      return (np.flip(x, spatial).transpose(*spatial, 0, 1),)
    return (x.transpose(*spatial, 1, 0),)

  def write(x):
    spatial = tuple(range(x.ndim - 2))
    if transposed:
      return np.flip(x, spatial).transpose(-2, -1, *spatial)
    return x.transpose(-1, -2, *spatial)

  return [
    Rule(f"{theirs}.weight", (f"{ours}.kernel",), read, write),
    name_tables.same(f"{theirs}.bias", f"{ours}.bias"),
  ]


def _batch_norm(theirs: str, ours: str) -> list[Rule]:
  return [
    *name_tables.norm(theirs, ours),
    name_tables.same(f"{theirs}.running_mean", f"{ours}.mean"),
    name_tables.same(f"{theirs}.running_var", f"{ours}.var"),
  ]


def _with_rgb_input(rules: list[Rule], ours: str) -> list[Rule]:
  """Replaces the rule of a first layer: each 3 input channels are reversed."""

  def reverse(x):  # (out, in, *spatial)
    groups = x.reshape(len(x), -1, 3, *x.shape[2:])
    return groups[:, :, ::-1].reshape(x.shape)

  def with_reversed_input(rule):
    return dataclasses.replace(
      rule,
      read=lambda x: rule.read(reverse(x)),
      write=lambda x: reverse(rule.write(x)),
    )

  return [
    with_reversed_input(rule) if rule.ours == (ours,) else rule
    for rule in rules
  ]


# --- Reading ------------------------------------------------------------------


def _load(path: Path) -> dict[str, np.ndarray]:
  content = torch_files.load(path)
  if isinstance(content, Mapping) and "state_dict" in content:
    content = content["state_dict"]
  if isinstance(content, Mapping):
    content = {
      str(key).removeprefix("module."): value
      for key, value in content.items()
      # Counted by PyTorch's batch norm; unused here.
      if not str(key).endswith("num_batches_tracked")
    }
  return torch_files.to_numpy(content, path)


def _fill(
  network: nnx.Module,
  rules: list[Rule],
  arrays: Mapping[str, np.ndarray],
  path: Path,
) -> nnx.Module:
  """Returns the network with the given arrays, in evaluation mode.

  Raises:
    WeightsError: shapes differ; the message has PyTorch's names and shapes.
  """
  variables = named_variables(network)
  rule_of = {rule.ours[0]: rule for rule in rules}

  def pytorch_shape(name, shape):
    return rule_of[name].write(np.empty(shape, np.bool_)).shape

  mismatched = [
    f"  {rule_of[name].theirs}: shape {pytorch_shape(name, array.shape)}, "
    f"expected {pytorch_shape(name, variables[name].shape)}"
    for name, array in arrays.items()
    if array.shape != variables[name].shape
  ]
  if mismatched:
    raise WeightsError(
      f"{path}: arrays that do not fit: {len(mismatched)}\n"
      + "\n".join(mismatched)
    )
  graphdef, state = nnx.split(network)
  flat_state = [
    (keys, variable.replace(jnp.asarray(arrays[".".join(map(str, keys))])))
    for keys, variable in nnx.to_flat_state(state)
  ]
  filled = nnx.merge(graphdef, nnx.from_flat_state(flat_state))
  filled.eval()
  return filled
