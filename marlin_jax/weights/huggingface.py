"""HuggingFace VideoMAE folders: config.json, model.safetensors, preprocessor.

Read and written without the transformers package and without remote code.
transformers 5 expects LayerNorm epsilon 1e-5 in the config, `q_bias` and
`v_bias` in the file although its module has query.bias and value.bias, the
head's pixels ordered (pt ph pw c), and a final norm whose name depends on the
class. It computes the position table in float64 and never saves it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from marlin_jax.data.clip_geometry import IMAGENET_MEAN, IMAGENET_STD
from marlin_jax.weights import name_tables, safetensors_folder, videomae
from marlin_jax.weights.architecture import Architecture
from marlin_jax.weights.weights import Weights, WeightsError

# Class -> (prefix of the encoder's names, name of its final norm).
CLASSES = {
  "VideoMAEModel": ("", "layernorm"),
  "VideoMAEForPreTraining": ("videomae.", "videomae.layernorm"),
  "VideoMAEForVideoClassification": ("videomae.", "fc_norm"),
}
_PREPROCESSOR = "preprocessor_config.json"
# Defaults of VideoMAEConfig, which transformers leaves out of the file.
_DEFAULTS = {
  "image_size": 224,
  "patch_size": 16,
  "num_channels": 3,
  "num_frames": 16,
  "tubelet_size": 2,
  "hidden_size": 768,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "intermediate_size": 3072,
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-12,
  "qkv_bias": True,
  "qv_bias": True,
  "use_mean_pooling": True,
  "decoder_num_attention_heads": 6,
  "decoder_hidden_size": 384,
  "decoder_num_hidden_layers": 4,
  "decoder_intermediate_size": 1536,
  "norm_pix_loss": True,
}


def is_huggingface(path: Path) -> bool:
  return safetensors_folder.read_config(path).get("model_type") == "videomae"


def rules(architecture: Architecture, kind: str) -> list[name_tables.Rule]:
  """Returns the name table of a network in a class of CLASSES."""
  prefix, norm = CLASSES[kind]
  table = [
    *name_tables.patch_embedding(
      f"{prefix}embeddings.patch_embeddings.projection",
      "encoder.patch_embedding",
      architecture,
    ),
    *_blocks(
      f"{prefix}encoder.layer", "encoder.transformer", architecture.depth
    ),
    *name_tables.norm(norm, "encoder.norm"),
  ]
  if architecture.has_decoder:
    table += [
      name_tables.transposed("encoder_to_decoder.weight", "enc_to_dec.kernel"),
      name_tables.batched("mask_token", "mask_token", 2),
      *_blocks("decoder.decoder_layers", "decoder", architecture.dec_depth),
      *name_tables.norm("decoder.norm", "dec_norm"),
      *name_tables.videomae_head("decoder.head", "head"),
    ]
  return table


def _blocks(theirs: str, ours: str, depth: int) -> list[name_tables.Rule]:
  table = []
  for i in range(depth):
    a, b = f"{theirs}.{i}", f"{ours}.blocks.{i}"
    inner = f"{a}.attention.attention"
    table += [
      *name_tables.norm(f"{a}.layernorm_before", f"{b}.norm1"),
      *(
        name_tables.transposed(
          f"{inner}.{n}.weight", f"{b}.attention.{n}.kernel"
        )
        for n in ("query", "key", "value")
      ),
      name_tables.same(f"{inner}.q_bias", f"{b}.attention.query.bias"),
      name_tables.same(f"{inner}.v_bias", f"{b}.attention.value.bias"),
      *name_tables.linear(f"{a}.attention.output.dense", f"{b}.attention.out"),
      *name_tables.norm(f"{a}.layernorm_after", f"{b}.norm2"),
      *name_tables.linear(f"{a}.intermediate.dense", f"{b}.mlp_in"),
      *name_tables.linear(f"{a}.output.dense", f"{b}.mlp_out"),
    ]
  return table


def read(path: Path, *, drop_classifier: bool = False) -> Weights:
  """Reads a folder.

  Its preprocessor gives the input convention: ImageNet's statistics or none.

  Args:
    path: the folder.
    drop_classifier: ignore a classifier, for which Weights have no place.

  Raises:
    WeightsError: something is missing, unknown or not supported.
  """
  config = safetensors_folder.read_config(path)
  if config.get("model_type") != "videomae":
    raise WeightsError(
      f"{path}: expected a folder whose {safetensors_folder.CONFIG} says "
      "model_type 'videomae'"
    )
  theirs = safetensors_folder.load_shards(path)
  # Some files use the names of the module, query.bias for q_bias.
  theirs = {
    re.sub(r"\.(query|value)\.bias$", lambda m: f".{m[1][0]}_bias", key): value
    for key, value in theirs.items()
  }
  if drop_classifier:
    theirs = {
      k: v for k, v in theirs.items() if not k.startswith("classifier.")
    }
  kind = _class_of(config, path)
  architecture = _architecture(config, kind, path)
  try:
    arrays = name_tables.read(rules(architecture, kind), theirs, str(path))
  except WeightsError as e:
    if "classifier.weight" in theirs:
      raise WeightsError(
        f"{e}\nclassifier.* is a classifier: python -m marlin_jax.convert "
        "--drop_classifier leaves it out"
      ) from e
    raise
  return Weights(
    architecture, arrays | videomae.position_tables(architecture), str(path)
  )


def _class_of(config: dict, path: Path) -> str:
  for kind in config.get("architectures") or ():
    if kind in CLASSES:
      return kind
  raise WeightsError(
    f"{path / safetensors_folder.CONFIG} names the class "
    f"{config.get('architectures')}, expected one of {', '.join(CLASSES)}"
  )


def _architecture(config: dict, kind: str, path: Path) -> Architecture:
  config = _DEFAULTS | config
  required = {
    "hidden_act": "gelu",
    "num_channels": 3,
    "qkv_bias": True,
    "qv_bias": True,
    # With mean pooling the two other classes have no final norm, which features
    # need.
    "use_mean_pooling": kind == "VideoMAEForVideoClassification",
  }
  wrong = [
    f"{key} is {config[key]!r}, expected {value!r}"
    for key, value in required.items()
    if config[key] != value
  ]
  if wrong:
    raise WeightsError(
      f"{path / safetensors_folder.CONFIG}, class {kind}: " + "; ".join(wrong)
    )
  architecture = Architecture(
    width=config["hidden_size"],
    depth=config["num_hidden_layers"],
    num_heads=config["num_attention_heads"],
    mlp_dim=config["intermediate_size"],
    num_frames=config["num_frames"],
    image_size=config["image_size"],
    tubelet_size=config["tubelet_size"],
    patch_size=config["patch_size"],
    imagenet_input=_imagenet_input(path),
    norm_eps=config["layer_norm_eps"],
  )
  if kind != "VideoMAEForPreTraining":
    return architecture
  return dataclasses.replace(
    architecture,
    dec_width=config["decoder_hidden_size"],
    dec_depth=config["decoder_num_hidden_layers"],
    dec_num_heads=config["decoder_num_attention_heads"],
    dec_mlp_dim=config["decoder_intermediate_size"],
    norm_pix=config["norm_pix_loss"],
  )


def _imagenet_input(path: Path) -> bool:
  """Returns whether the preprocessor applies ImageNet's statistics.

  They are the default if the folder has no preprocessor.

  Raises:
    WeightsError: it applies other statistics.
  """
  config = safetensors_folder.read_config(path, _PREPROCESSOR)
  if not config.get("do_normalize", True):
    return False
  mean, std = config.get("image_mean"), config.get("image_std")
  for convention, expected in (
    (True, (IMAGENET_MEAN, IMAGENET_STD)),
    (False, ((0,) * 3, (1,) * 3)),
  ):
    if np.allclose(mean or IMAGENET_MEAN, expected[0]) and np.allclose(
      std or IMAGENET_STD, expected[1]
    ):
      return convention
  raise WeightsError(
    f"{path / _PREPROCESSOR} normalises with mean {mean} and standard "
    f"deviation {std}, expected ImageNet's or none"
  )


_PROBLEM_TYPES = {
  "binary": "multi_label_classification",
  "class": "single_label_classification",
  "value": "regression",
}


@dataclasses.dataclass(frozen=True)
class Classifier:
  """Linear layer on the pooled feature, for VideoMAEForVideoClassification.

  Attributes:
    kernel, bias: float (D, K), (K,).
    names: names of the K labels, classes or numbers.
    kind: 'binary', K independent labels; 'class', one of K; 'value', K numbers.
  """

  kernel: np.ndarray
  bias: np.ndarray
  names: Sequence[str]
  kind: str

  def config(self) -> dict:
    """Returns the entries of config.json."""
    return {
      "id2label": {str(i): name for i, name in enumerate(self.names)},
      "label2id": {name: i for i, name in enumerate(self.names)},
      "problem_type": _PROBLEM_TYPES[self.kind],
    }

  def arrays(self) -> dict[str, np.ndarray]:
    """Returns the arrays under their names in transformers."""
    return {
      "classifier.weight": np.ascontiguousarray(self.kernel.T, np.float32),
      "classifier.bias": np.asarray(self.bias, np.float32),
    }


def write(
  weights: Weights,
  path: Path,
  *,
  kind: str = "",
  fold_input: bool = False,
  classifier: Classifier | None = None,
) -> list[str]:
  """Writes a folder that the class's `from_pretrained` opens.

  Args:
    weights: the network.
    path: the folder.
    kind: a class of CLASSES; default: VideoMAEForPreTraining if there is a
      decoder, else VideoMAEModel.
    fold_input: fold ImageNet's normalisation into the patch embedding, so that
      the usual VideoMAE preprocessing gives the same features. Otherwise the
      network keeps its convention and the preprocessor is written to match.
    classifier: a trained head for VideoMAEForVideoClassification, which
      without one returns the pooled feature.

  Returns:
    Notices about what the format cannot store.

  Raises:
    WeightsError: the class needs a decoder, and there is none.
  """
  kind = kind or (
    "VideoMAEForPreTraining"
    if weights.architecture.has_decoder
    else "VideoMAEModel"
  )
  notices = []
  if fold_input:
    weights = weights.with_imagenet_input()
  if kind != "VideoMAEForPreTraining":
    weights = weights.encoder_only()
  elif not weights.architecture.has_decoder:
    raise WeightsError(f"{weights.source}: {kind} needs a decoder")
  elif not weights.architecture.imagenet_input:
    notices.append(
      "transformers undoes ImageNet's normalisation before it computes the "
      "loss: for a correct loss, export with --fold_input"
    )
  architecture, arrays, dropped = videomae.drop_unsupported(weights)
  path.mkdir(parents=True, exist_ok=True)
  theirs = name_tables.write(rules(architecture, kind), arrays)
  config = _config(architecture, kind)
  if classifier is not None:
    theirs |= classifier.arrays()
    config |= classifier.config()
  safetensors_folder.save_arrays(
    theirs,
    path / safetensors_folder.ARRAYS,
    format="pt",  # required by transformers
  )
  safetensors_folder.save_config(
    _preprocessor_config(architecture), path, _PREPROCESSOR
  )
  safetensors_folder.save_config(config, path)
  return notices + dropped


def _config(architecture: Architecture, kind: str) -> dict:
  config = {
    "architectures": [kind],
    "model_type": "videomae",
    "image_size": architecture.image_size,
    "patch_size": architecture.patch_size,
    "num_channels": 3,
    "num_frames": architecture.num_frames,
    "tubelet_size": architecture.tubelet_size,
    "hidden_size": architecture.width,
    "num_hidden_layers": architecture.depth,
    "num_attention_heads": architecture.num_heads,
    "intermediate_size": architecture.mlp_dim,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": architecture.norm_eps,
    "qkv_bias": True,
    "use_mean_pooling": kind == "VideoMAEForVideoClassification",
    "norm_pix_loss": architecture.norm_pix,
    "dtype": "float32",
  }
  if kind == "VideoMAEForPreTraining":
    config |= {
      "decoder_hidden_size": architecture.dec_width,
      "decoder_num_hidden_layers": architecture.dec_depth,
      "decoder_num_attention_heads": architecture.dec_num_heads,
      "decoder_intermediate_size": architecture.dec_mlp_dim,
    }
  if kind == "VideoMAEForVideoClassification":
    # Without labels transformers returns the pooled feature as logits.
    config |= {"id2label": {}, "label2id": {}}
  return config


def _preprocessor_config(architecture: Architecture) -> dict:
  size = architecture.image_size
  plain = not architecture.imagenet_input
  return {
    "image_processor_type": "VideoMAEImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": size},
    "do_center_crop": True,
    "crop_size": {"height": size, "width": size},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.0] * 3 if plain else list(IMAGENET_MEAN),
    "image_std": [1.0] * 3 if plain else list(IMAGENET_STD),
  }
