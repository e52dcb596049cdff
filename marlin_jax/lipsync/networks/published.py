"""Published weights of lip synchronisation, by path.

Wav2Lip's (github.com/Rudrabha/Wav2Lip, its README's table): lipsync_expert.pth,
wav2lip.pth, wav2lip_gan.pth and visual_quality_disc.pth, each a dict whose
'state_dict' has the arrays, their names with 'module.' before them or not. And
the scorer's (github.com/joonson/syncnet_python): syncnet_v2.model, the arrays
themselves.

Wav2Lip's pictures are BGR, for OpenCV reads them; this project's are RGB. The
tables turn the channels of the first layer, and of the generator's last, so
that the networks here take and give RGB. The scorer's network stays BGR.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
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
  """A network whose weights are published.

  Attributes:
    what: for messages.
    mark: an array that no other of them has.
    make: draws one.
    rules: of such a network the table; see tables.
  """

  what: str
  mark: str
  make: Callable[[], nnx.Module]
  rules: Callable[[nnx.Module], list[Rule]]


def read_expert(path: str | Path) -> SyncExpert:
  """Wav2Lip's expert for 5 frames, lipsync_expert.pth.

  This and the other readers return networks in evaluation mode.

  Raises:
    WeightsError: the file cannot be read as weights, or is of another network;
      the message says what was found and expected.
  """
  return _read(EXPERT, path)


def read_wav2lip(path: str | Path) -> Wav2Lip:
  """Wav2Lip's generator, wav2lip.pth or wav2lip_gan.pth; see read_expert."""
  return _read(WAV2LIP, path)


def read_quality_discriminator(path: str | Path) -> QualityDiscriminator:
  """Wav2Lip's discriminator, visual_quality_disc.pth; see read_expert."""
  return _read(QUALITY_DISCRIMINATOR, path)


def read_syncnet(path: str | Path) -> SyncNet:
  """The scorer's network, syncnet_v2.model; see read_expert."""
  return _read(SYNCNET, path)


def named(network: nnx.Module) -> dict[str, nnx.Variable]:
  """A network's arrays by their place in it: 'face_layers.0.norm.scale'."""
  return {
    ".".join(map(str, path)): variable
    for path, variable in nnx.to_flat_state(nnx.state(network))
  }


# --- tables -------------------------------------------------------------------


def _expert_rules(network: SyncExpert) -> list[Rule]:
  found = [
    *_sequence("face_encoder", "face_layers", network.face_layers),
    *_sequence("audio_encoder", "sound_layers", network.sound_layers),
  ]
  return _with_input_turned(found, "face_layers.0.convolution.kernel")


def _wav2lip_rules(network: Wav2Lip) -> list[Rule]:
  found = _sequence("audio_encoder", "sound_layers", network.sound_layers)
  for theirs, ours in (
    ("face_encoder_blocks", "face_stages"),
    ("face_decoder_blocks", "decoder_stages"),
  ):
    for i, stage in enumerate(getattr(network, ours)):
      found += _sequence(f"{theirs}.{i}", f"{ours}.{i}", stage)
  found += _layer("output_block.0.conv_block", "output.hidden")
  found = _with_input_turned(found, "face_stages.0.0.convolution.kernel")
  kernel, bias = _convolution("output_block.1", "output.colours")
  return [
    *found,
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
  places = [(i, j) for i, rows in enumerate(STAGES) for j in range(len(rows))]
  found = []
  for number, (i, j) in enumerate(places):
    found += _convolution(
      f"face_encoder_blocks.{i}.{j}.conv_block.0",
      f"layers.{number}.convolution",
    )
  found += _convolution("binary_pred.0", "logit")
  return _with_input_turned(found, "layers.0.convolution.kernel")


def _syncnet_rules(network: SyncNet) -> list[Rule]:
  # Convolution, norm and ReLU have a number each, and so has a pooling.
  sound = (0, 4, 8, 11, 14, 18)
  face = (0, 4, 8, 11, 14, 18)
  found = []
  for theirs, ours, numbers in (
    ("netcnnaud", "sound_layers", sound),
    ("netcnnlip", "face_layers", face),
  ):
    for i, number in enumerate(numbers):
      found += _convolution(
        f"{theirs}.{number}", f"{ours}.{i}.convolution"
      ) + _batch_norm(f"{theirs}.{number + 1}", f"{ours}.{i}.norm")
  for theirs, ours in (("netfcaud", "sound_out"), ("netfclip", "face_out")):
    found += [
      *name_tables.linear(f"{theirs}.0", f"{ours}.hidden"),
      *_batch_norm(f"{theirs}.1", f"{ours}.norm"),
      *name_tables.linear(f"{theirs}.3", f"{ours}.linear"),
    ]
  return found


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
  "the scorer's SyncNet (syncnet_v2.model)",
  "netcnnlip.0.weight",
  lambda: SyncNet(rngs=nnx.Rngs(0)),
  _syncnet_rules,
)
PUBLISHED = (EXPERT, WAV2LIP, QUALITY_DISCRIMINATOR, SYNCNET)


# --- rules --------------------------------------------------------------------


def _sequence(theirs: str, ours: str, layers) -> list[Rule]:
  found = []
  for i, layer in enumerate(layers):
    found += _layer(
      f"{theirs}.{i}.conv_block",
      f"{ours}.{i}",
      transposed=isinstance(layer, TransposedConvolution),
    )
  return found


def _layer(theirs: str, ours: str, *, transposed: bool = False) -> list[Rule]:
  return [
    *_convolution(f"{theirs}.0", f"{ours}.convolution", transposed=transposed),
    *_batch_norm(f"{theirs}.1", f"{ours}.norm"),
  ]


def _convolution(
  theirs: str, ours: str, *, transposed: bool = False
) -> list[Rule]:
  """PyTorch keeps kernels as (out, in, places), nnx as (places, in, out).

  Transposed ones PyTorch keeps as (in, out, places), seen from the other side:
  as those of the convolution whose gradient they are.
  """

  def read(x):
    places = tuple(range(2, x.ndim))
    if transposed:
      return (np.flip(x, places).transpose(*places, 0, 1),)
    return (x.transpose(*places, 1, 0),)

  def write(x):
    places = tuple(range(x.ndim - 2))
    if transposed:
      return np.flip(x, places).transpose(-2, -1, *places)
    return x.transpose(-1, -2, *places)

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


def _with_input_turned(rules: list[Rule], ours: str) -> list[Rule]:
  """The same, with each three input channels of one kernel reversed."""

  def turned(x):  # (out, in, places)
    colours = x.reshape(len(x), -1, 3, *x.shape[2:])[:, :, ::-1]
    return colours.reshape(x.shape)

  def turn(rule):
    return dataclasses.replace(
      rule,
      read=lambda x: rule.read(turned(x)),
      write=lambda x: turned(rule.write(x)),
    )

  return [turn(rule) if rule.ours == (ours,) else rule for rule in rules]


# --- reading ------------------------------------------------------------------


def _read(published: Published, path: str | Path) -> nnx.Module:
  path = Path(path).expanduser()
  if not path.is_file():
    raise WeightsError(f"no {published.what} at {path}: there is no such file")
  theirs = _load(path)
  _check_kind(published, theirs, path)
  network = nnx.eval_shape(published.make)
  rules = published.rules(network)
  return _filled(
    network, rules, name_tables.read(rules, theirs, str(path)), path
  )


def _load(path: Path) -> dict[str, np.ndarray]:
  content = torch_files.load(path)
  if isinstance(content, Mapping) and "state_dict" in content:
    content = content["state_dict"]
  if isinstance(content, Mapping):
    content = {
      str(key).removeprefix("module."): value
      for key, value in content.items()
      # PyTorch counts batches; nothing uses it here.
      if not str(key).endswith("num_batches_tracked")
    }
  return torch_files.to_numpy(content, path)


def _check_kind(published, theirs, path) -> None:
  """Says it in one line where a file is of another of these networks.

  Raises:
    WeightsError: so it is.
  """
  for other in PUBLISHED:
    if other is not published and other.mark in theirs:
      raise WeightsError(f"{path} is {other.what}, expected {published.what}")


def _filled(network, rules, arrays, path) -> nnx.Module:
  variables = named(network)
  theirs = {rule.ours[0]: rule for rule in rules}
  wrong = [
    f"  {theirs[name].theirs}: shape {_written(theirs[name], array)}, expected "
    f"{_written(theirs[name], np.empty(variables[name].shape, np.bool_))}"
    for name, array in arrays.items()
    if array.shape != variables[name].shape
  ]
  if wrong:
    raise WeightsError(
      f"{path}: {len(wrong)} array(s) do not fit\n" + "\n".join(wrong)
    )
  graphdef, state = nnx.split(network)
  flat = [
    (place, variable.replace(jnp.asarray(arrays[".".join(map(str, place))])))
    for place, variable in nnx.to_flat_state(state)
  ]
  filled = nnx.merge(graphdef, nnx.from_flat_state(flat))
  filled.eval()
  return filled


def _written(rule: Rule, array: np.ndarray) -> tuple[int, ...]:
  return rule.write(array).shape
