"""Trained model of a downstream task: an encoder, a head and how to use them.

An evaluation keeps one for each of its results; `marlin_jax.predict` applies it
to videos. On disk it is a folder of plain data:

  model.json         names, thresholds, windows, origin; see `Description`
  model.safetensors  the head
  encoder/           the encoder, if the task trained it, in the format
                     `safetensors`; else it is opened from where it was

Axes: B clips, T frames, S pixels of the square picture, W windows of a video,
N tokens, D width, V training videos, K labels, classes or numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import nnx
from jax.sharding import Mesh

from marlin_jax.devices import sharding
from marlin_jax.inference import (
  clip_features,
  face_windows,
  nearest_neighbours,
  stream,
)
from marlin_jax.inference.clips import window_settings
from marlin_jax.models import heads, partition, softmax_attention, vit
from marlin_jax.records.folders import atomic_path, write_bytes
from marlin_jax.weights import formats, hub, safetensors_folder
from marlin_jax.weights.architecture import flatten, unflatten
from marlin_jax.weights.weights import Weights, WeightsError, encoder_sha256

# 'linear' and 'neighbours' take the pooled features of a video's windows; the
# others take the tokens of a window, and a video has the mean over its windows.
VIDEO_HEADS = ("linear", "neighbours")
WINDOW_HEADS = ("mean", "attentive")

_DESCRIPTION, _HEAD, _ENCODER = "model.json", "model.safetensors", "encoder"
_FORMAT, _VERSION = "marlin_jax classifier", 2


@dataclasses.dataclass(frozen=True)
class Description:
  """Content of model.json.

  Attributes:
    task: name of the task.
    names: names of the K labels, classes or numbers.
    kind: 'binary', K independent labels; 'class', one of K; 'value', K numbers.
    head: one of VIDEO_HEADS or WINDOW_HEADS.
    thresholds: K; a label is predicted above this probability. Numbers have
      none.
    encoder: path or name of the checkpoint.
    encoder_sha256: hash of the encoder; see `encoder_sha256`.
    pool: how the features of windows become one: mean, std or mean_std.
    options: keyword arguments of the head.
    temperature: divides the logits of calibrated probabilities (Guo et al.,
      ICML 2017).
    crop_face: the face is cropped, as in the training data.
    origin: facts about the training, such as scores and hashes, for the reader.
  """

  task: str
  names: tuple[str, ...]
  kind: str
  head: str
  thresholds: tuple[float, ...]
  encoder: str
  encoder_sha256: str
  pool: str = "mean"
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  temperature: float = 1.0
  crop_face: bool = True
  origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Head:
  """A trained head, and the encoder if the task trained it.

  Attributes:
    kind: one of VIDEO_HEADS or WINDOW_HEADS.
    arrays: `kernel` (D, K) and `bias` (K,) of 'linear'; `train` (V, D),
      `labels` and `known` (V, K) of 'neighbours', and if centred `centre` (D,);
      else the parameters of the module.
    options: keyword arguments: `k` and `temperature` of 'neighbours',
      `num_heads` of 'attentive'.
    encoder: weights of the trained encoder; None if it was frozen.
  """

  kind: str
  arrays: Mapping[str, np.ndarray]
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  encoder: Weights | None = None


@dataclasses.dataclass(frozen=True)
class Prediction:
  """Prediction of a classifier for a video.

  Attributes:
    names: names of the K labels, classes or numbers.
    probabilities: float64 (K,); numbers of a model of numbers.
    predicted: the class with the highest probability, or all labels above
      their thresholds; () for numbers.
    window_probabilities: float64 (W, K), or None if the head judges whole
      videos only.
  """

  names: tuple[str, ...]
  probabilities: np.ndarray
  predicted: tuple[str, ...]
  window_probabilities: np.ndarray | None

  def as_dict(self) -> dict[str, float]:
    """Returns the probabilities or numbers by name."""
    values = self.probabilities.tolist()
    return dict(zip(self.names, values, strict=True))


class VideoClassifier:
  """An encoder with a trained head.

    classifier = Marlin.load_classifier("runs/far/models/appearance-linear-1-0")
    classifier.predict("clip.mp4").as_dict()

  Attributes:
    description: names, thresholds and settings.
    weights: weights of the encoder.
  """

  def __init__(
    self,
    description: Description,
    weights: Weights,
    arrays: Mapping[str, np.ndarray],
    *,
    dtype: str = "float32",
    attention: str = "auto",
    mesh: Mesh | None = None,
  ):
    """Builds the network.

    Args:
      description: names, thresholds and settings.
      weights: weights of the encoder; others are left out.
      arrays: see `Head.arrays`.
      dtype, attention: as of `Marlin`.
      mesh: devices of this process that share each batch, which must divide
        over them; None: one device.
    """
    mesh = mesh or sharding.make_mesh(devices=jax.local_devices()[:1])
    self._split = sharding.batch_sharding(mesh)
    everywhere = sharding.replicated(mesh)
    placement = None
    if mesh.size > 1:
      placement = sharding.MeshPlacement(mesh, dtype)
    self.description = description
    self.weights = weights.encoder_only()
    self._arrays = dict(arrays)
    architecture = self.weights.architecture
    encoder = self.weights.autoencoder(
      dtype=dtype,
      attention=softmax_attention.choose(
        attention, jax.default_backend(), dtype
      ),
    )
    if description.head in VIDEO_HEADS:
      graphdef, params = nnx.split(encoder)
      self._params = jax.device_put(params, everywhere)
      self._outputs = clip_features.jitted_features(
        graphdef, architecture, placement=placement, out_shardings=everywhere
      )
      return
    graphdef, params = nnx.split(
      heads.Classifier(encoder, self._network_head())
    )
    self._params = jax.device_put(params, everywhere)

    @functools.partial(jax.jit, out_shardings=everywhere)
    def logits(params, x):
      with partition.use(placement), vit.exact_matmuls(dtype):
        tokens = clip_features.to_tokens(x, architecture)
        return nnx.merge(graphdef, params)(tokens)

    self._outputs = logits

  def _network_head(self) -> nnx.Module:
    make = heads.LinearHead
    if self.description.head == "attentive":
      make = heads.AttentiveHead
    num_outputs = len(self.description.names)
    width = self.weights.architecture.width
    graphdef, state = nnx.split(
      make(width, num_outputs, nnx.Rngs(0), **self.description.options)
    )
    expected = {
      name: array.shape
      for name, array in flatten(nnx.to_pure_dict(state)).items()
    }
    given = {name: array.shape for name, array in self._arrays.items()}
    if expected != given:
      raise WeightsError(
        f"the head '{self.description.head}' has arrays {given}, expected "
        f"{expected}"
      )
    nnx.replace_by_pure_dict(state, unflatten(self._arrays))
    return nnx.merge(graphdef, state)

  # --- Prediction -------------------------------------------------------------

  def outputs(self, clips: np.ndarray) -> jax.Array:
    """Applies the network to clips.

    Args:
      clips: uint8 (B, T, S, S, 3), RGB.

    Returns:
      float32 (B, D) features, or (B, K) logits if the head takes tokens.
    """
    return self._outputs(self._params, jax.device_put(clips, self._split))

  def probabilities(self, outputs: np.ndarray) -> np.ndarray:
    """Returns the probabilities or numbers of a video, float64 (K,).

    Args:
      outputs: `outputs` of its windows, (W, D) or (W, K).
    """
    if self.description.head in WINDOW_HEADS:
      return self._activated(outputs).mean(axis=0)
    features = stream.reduced(outputs, self.description.pool)[None]
    if self.description.head == "linear":
      features = features.astype(np.float64)
      logits = features @ self._arrays["kernel"] + self._arrays["bias"]
      return self._activated(logits)[0]
    return nearest_neighbours.predict(
      features, **self._arrays, **self.description.options
    )[0]

  def window_probabilities(self, outputs: np.ndarray) -> np.ndarray | None:
    """Returns the predictions of each window by itself, float64 (W, K).

    Returns None if features are pooled by their standard deviation, which a
    single window does not have.
    """
    if self.description.head in WINDOW_HEADS:
      return self._activated(outputs)
    if self.description.pool != "mean":
      return None
    return np.stack([self.probabilities(row[None]) for row in outputs])

  def _activated(self, logits: np.ndarray) -> np.ndarray:
    return activated(logits, self.description.kind)

  def calibrated(self, probabilities: np.ndarray) -> np.ndarray:
    """Returns probabilities whose logits are divided by the temperature.

    Raises:
      WeightsError: the model predicts numbers.
    """
    if self.description.kind == "value":
      raise WeightsError(
        f"the model of '{self.description.task}' predicts numbers: only "
        "probabilities can be calibrated"
      )
    return rescaled(
      probabilities,
      self.description.temperature,
      is_class=self.description.kind == "class",
    )

  def decided(self, probabilities: np.ndarray) -> tuple[str, ...]:
    """Returns the class, or the labels, predicted from float64 (K,)."""
    names = self.description.names
    if self.description.kind == "class":
      return (names[int(probabilities.argmax())],)
    if self.description.kind == "value":
      return ()
    return tuple(
      name
      for name, p, threshold in zip(
        names, probabilities, self.description.thresholds, strict=True
      )
      if p > threshold
    )

  def prediction(self, outputs: np.ndarray) -> Prediction:
    """Returns the prediction of a video; `outputs` as of `probabilities`."""
    probabilities = self.probabilities(outputs)
    return Prediction(
      self.description.names,
      probabilities,
      self.decided(probabilities),
      self.window_probabilities(outputs),
    )

  def window_settings(
    self, *, crop_face: bool | None = None
  ) -> face_windows.WindowSettings:
    """Returns the windows of a video that the classifier takes.

    Args:
      crop_face: crop the face; None: as in the training data. False is right
        for videos of face crops.
    """
    if crop_face is None:
      crop_face = self.description.crop_face
    return window_settings(
      self.weights.architecture,
      crop_face=crop_face,
      sample_rate=None,
      stride=None,
      window_rule="cover",
    )

  def predict(
    self,
    path: str | os.PathLike,
    *,
    crop_face: bool | None = None,
    batch_size: int | None = None,
  ) -> Prediction:
    """Predicts the labels of a video file.

    Args:
      path: a video file that FFmpeg decodes.
      crop_face: see `window_settings`.
      batch_size: windows per batch; by default 1 on CPU, else 16.

    Raises:
      FaceVideoError: the video is damaged, over a limit or shows no face.
      UserError: this machine lacks a face model or a library.
    """
    settings = self.window_settings(crop_face=crop_face)
    with contextlib.closing(face_windows.read_ahead(path, settings)) as windows:
      outputs = stream.encode(
        self.outputs,
        (window.frames for window in windows),
        batch_size or stream.default_batch_size(),
      )
      return self.prediction(np.stack(list(outputs)))

  @functools.cached_property
  def head_sha256(self) -> str:
    """Hash of the head, and of how its outputs become decisions."""
    described = dataclasses.asdict(self.description)
    facts = {
      k: v for k, v in described.items() if k not in ("encoder", "origin")
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(self._arrays):
      digest.update(name.encode())
      digest.update(self._arrays[name].tobytes())
    return digest.hexdigest()

  # --- Export -----------------------------------------------------------------

  @property
  def linear_layer(self) -> tuple[np.ndarray, np.ndarray]:
    """Kernel (D, K) and bias (K,) on the mean feature of a window.

    Raises:
      WeightsError: the head is none, or its features are pooled by deviation.
    """
    head, pool = self.description.head, self.description.pool
    if head == "mean":
      return self._arrays["linear.kernel"], self._arrays["linear.bias"]
    if head != "linear" or pool != "mean":
      raise WeightsError(
        f"the head '{head}' on features pooled by '{pool}' is not a linear "
        "layer on the mean feature: only models of linear (with pool=mean), "
        "layernorm, lora and finetune can be exported"
      )
    return self._arrays["kernel"], self._arrays["bias"]

  def exported(self, platforms: Sequence[str]) -> jax.export.Exported:
    """Compiles clips to probabilities or numbers as portable StableHLO.

    Args:
      platforms: such as 'cpu', 'cuda' and 'tpu'.

    Returns:
      A function of uint8 (B, T, S, S, 3), for any B, that returns float32
      (B, K); `jax.export.deserialize` opens its `serialize()`.

    Raises:
      WeightsError: see `linear_layer`.
    """
    architecture = self.weights.architecture
    # The implementations of attention for one platform do not run on others.
    encoder = self.weights.autoencoder(attention="plain")
    kernel, bias = (jnp.asarray(x, jnp.float32) for x in self.linear_layer)

    def predictions(clips):
      features = clip_features.features(encoder, architecture, clips)
      with vit.exact_matmuls("float32"):
        logits = features @ kernel + bias
      activations = {"binary": jax.nn.sigmoid, "class": jax.nn.softmax}
      return activations.get(self.description.kind, lambda x: x)(logits)

    tubelets = architecture.tubelets
    size, num_frames = tubelets.image_size, tubelets.num_frames
    shape = jax.export.symbolic_shape(f"b, {num_frames}, {size}, {size}, 3")
    clips = jax.ShapeDtypeStruct(shape, jnp.uint8)
    return jax.export.export(jax.jit(predictions), platforms=platforms)(clips)

  # --- Files ------------------------------------------------------------------

  def push_to_hub(
    self,
    target: str,
    *,
    license: str,
    data: str,
    results: Iterable[str | os.PathLike] = (),
    private: bool = False,
  ) -> str:
    """Publishes the classifier with its encoder, and a model card.

    Args:
      target, private: see `hub.push`.
      license, data: see `hub.Card`.
      results: workdir of the evaluation that trained it, for the card.

    Returns:
      The address of the commit.

    Raises:
      WeightsError: see `hub.push` and `hub.read_results`.
    """
    described = self.description
    origin = dict(described.origin)
    trained_on = origin.get("settings", {}).get("checkpoint", "")
    card = hub.Card(
      license=license,
      data=data,
      description=f"Predicts '{described.task}' of face videos: "
      f"{', '.join(described.names)}.",
      usage="from marlin_jax import Marlin\n"
      'model = Marlin.load_classifier("NAME")\n'
      'model.predict("clip.mp4").as_dict()',
      facts={
        "head": described.head,
        "sha256 of the encoder": described.encoder_sha256,
      },
      results=hub.read_results(results, trained_on, origin.get("cell", "")),
    )
    # The folders of data sets are of this machine.
    origin["data"] = Path(origin.get("data", "")).name
    origin["settings"] = _without_folders(origin.get("settings", {}))
    public = dataclasses.replace(described, encoder=_ENCODER, origin=origin)
    head = Head(described.head, self._arrays, described.options, self.weights)
    return hub.push(
      lambda folder: write(folder, public, head), target, card, private=private
    )

  @classmethod
  def load(
    cls, path: str | os.PathLike, *, encoder: str = "", **options
  ) -> VideoClassifier:
    """Opens a folder that an evaluation has written.

    Args:
      path: the folder, or a name on the HuggingFace hub; see `hub.fetch`.
      encoder: weights of the frozen encoder, if they are no longer where they
        were during the training.
      **options: `dtype`, `attention` and `mesh`; see `__init__`.

    Raises:
      WeightsError: the folder is damaged or of another kind, or the encoder is
        missing or another one.
    """
    if not Path(path).expanduser().exists() and hub.is_id(str(path)):
      path = hub.fetch(str(path))
    path = Path(path).expanduser()
    description = read_description(path)
    arrays = safetensors_folder.load_arrays(path / _HEAD)
    if (path / _ENCODER).is_dir():
      weights = formats.read(path / _ENCODER)
    else:
      source = encoder or description.encoder
      try:
        weights = formats.read(formats.resolve(source, full=False))
      except WeightsError as e:
        raise WeightsError(
          f"{path} is a head for the encoder {description.encoder!r}: {e}. "
          "Name its present place with --checkpoint"
        ) from e
    sha256 = encoder_sha256(weights)
    if sha256 != description.encoder_sha256:
      raise WeightsError(
        f"{weights.source} has the hash {sha256[:12]}, and {path} was trained "
        f"on an encoder with the hash {description.encoder_sha256[:12]} "
        f"({description.encoder})"
      )
    return cls(description, weights, arrays, **options)


def _without_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the settings of an evaluation without folders of data sets.

  Args:
    settings: the other data sets are PATH:SPLIT, comma-separated, in
      `data.tests`; each has a hash in `data.tests.PATH:SPLIT`.
  """
  tests, named = "data.tests", {}
  for key, value in settings.items():
    if key == tests:
      value = ",".join(Path(test).name for test in value.split(","))
    elif key.startswith(f"{tests}."):
      key = f"{tests}.{Path(key.removeprefix(f'{tests}.')).name}"
    named[key] = value
  return named


def activated(logits: np.ndarray, kind: str) -> np.ndarray:
  """Maps outputs of a head (..., K) to float64 predictions.

  Args:
    logits: the outputs.
    kind: 'binary', by sigmoid; 'class', by softmax; 'value', as they are.
  """
  logits = np.asarray(logits, np.float64)
  if kind == "value":
    return logits
  if kind == "binary":
    return 0.5 * (1 + np.tanh(logits / 2))
  e = np.exp(logits - logits.max(axis=-1, keepdims=True))
  return e / e.sum(axis=-1, keepdims=True)


def rescaled(
  probabilities: np.ndarray, temperature: float, *, is_class: bool
) -> np.ndarray:
  """Divides the logits of probabilities, float64 (..., K), by a temperature."""
  p = np.clip(probabilities, 1e-12, 1 - 1e-12)
  if is_class:
    powers = p ** (1 / temperature)
    return powers / powers.sum(axis=-1, keepdims=True)
  odds = (p / (1 - p)) ** (1 / temperature)
  return odds / (1 + odds)


def read_description(path: Path) -> Description:
  """Reads model.json of a classifier's folder.

  Raises:
    WeightsError: it is missing, damaged, or of another kind or version.
  """
  content = safetensors_folder.read_config(path, _DESCRIPTION)
  if content.get("format") != _FORMAT:
    raise WeightsError(
      f"{path}: expected a folder with {_DESCRIPTION} and {_HEAD}, as an "
      "evaluation writes them into WORKDIR/models"
    )
  if content.get("version") not in range(1, _VERSION + 1):
    raise WeightsError(
      f"{path / _DESCRIPTION} has version {content.get('version')}, this code "
      f"reads up to {_VERSION}: use a newer marlin_jax"
    )
  fields = {
    key: tuple(value) if isinstance(value, list) else value
    for key, value in content.items()
    if key not in ("format", "version", "is_class")
  }
  if "is_class" in content:  # version 1, before there were numbers
    fields["kind"] = "class" if content["is_class"] else "binary"
  try:
    return Description(**fields)
  except TypeError as e:
    raise WeightsError(f"{path / _DESCRIPTION}: {e}") from e


def write(path: Path, description: Description, head: Head) -> None:
  """Writes the folder of a classifier; model.json, which identifies it, last.

  Args:
    path: the folder; created if missing.
    description: names, thresholds and settings.
    head: the head, and the encoder if it was trained.
  """
  path.mkdir(parents=True, exist_ok=True)
  with atomic_path(path / _HEAD) as partial:
    arrays = {k: np.ascontiguousarray(v) for k, v in head.arrays.items()}
    safetensors.numpy.save_file(arrays, partial)
  if head.encoder is not None:
    safetensors_folder.write(head.encoder.encoder_only(), path / _ENCODER)
  content = {
    "format": _FORMAT,
    "version": _VERSION,
    **dataclasses.asdict(description),
  }
  data = json.dumps(content, indent=2) + "\n"
  write_bytes(path / _DESCRIPTION, data.encode())


def is_classifier(path: str | os.PathLike) -> bool:
  """Returns whether a path is the folder of a classifier."""
  return (Path(path).expanduser() / _DESCRIPTION).is_file()
