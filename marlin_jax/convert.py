"""Converts weights between formats.

  python -m marlin_jax.convert --from=marlin --to=safetensors \\
    marlin_vit_base_ytf.full.pt models/marlin_b
  python -m marlin_jax.convert --to=marlin runs/b marlin_b.encoder.pt

Formats:
  safetensors  a folder that `Marlin.from_pretrained` opens (default of --to)
  orbax        a training run: its workdir, or WORKDIR/checkpoints/STEP; written
               as step 0, for config.init_from
  marlin       the MARLIN authors' files: .encoder.pt (the encoder alone), .pt
               (with the decoder) or .ckpt (with the discriminator); SRC may
               be the name of a published model
  hf           a HuggingFace VideoMAE folder
  videomae     the original VideoMAE's .pth

A trained classifier, WORKDIR/models/CELL of an evaluation, converts too:
  hf           VideoMAEForVideoClassification with its label names
  stablehlo    a file that jax.export opens, without this project: clips to
               probabilities on CPU, GPU and TPU

Missing and unknown keys are errors, and no file can run code. At the end the
written file is read back and compared with the source on a real clip. PyTorch
files are also checked against a network in PyTorch.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from marlin_jax.records import cli, folders

# Largest difference of features and predictions; float32 gives about 1e-5.
TOLERANCE = 1e-4

_READ_OPTIONS = {
  "num_heads": "heads of the encoder, if no published network has its width",
  "dec_num_heads": "heads of the decoder, likewise",
  "num_frames": "frames of a clip (videomae)",
  "image_size": "height and width of a frame (videomae, marlin)",
}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
  parser = cli.ArgumentParser("marlin_jax.convert", __doc__)
  parser.add_argument("src", metavar="SRC", help="file, folder or name")
  parser.add_argument("dst", metavar="DST", help="file or folder to write")
  parser.add_argument(
    "--from",
    dest="source_format",
    metavar="FORMAT",
    default="",
    help="format of SRC (default: recognised from SRC)",
  )
  parser.add_argument(
    "--to",
    dest="target_format",
    metavar="FORMAT",
    default="safetensors",
    help="format of DST",
  )
  parser.add_argument(
    "--overwrite",
    action="store_true",
    help="replace DST if it exists and is the result of a conversion",
  )
  parser.add_argument(
    "--encoder_only",
    action="store_true",
    help="drop decoder and discriminator",
  )
  reading = parser.add_argument_group("values that SRC may not store")
  for name, text in _READ_OPTIONS.items():
    reading.add_argument(
      f"--{name}", type=cli.at_least(1), metavar="N", help=text
    )
  reading.add_argument(
    "--drop_classifier",
    action="store_true",
    help="ignore the classifier of a fine-tuned network (hf, videomae)",
  )
  writing = parser.add_argument_group("options of --to=hf")
  writing.add_argument(
    "--hf_class",
    choices=("model", "pretraining", "classification"),
    help="VideoMAEModel, VideoMAEForPreTraining or "
    "VideoMAEForVideoClassification, whose output without labels is the pooled "
    "feature (default: pretraining if there is a decoder, else model)",
  )
  writing.add_argument(
    "--fold_input",
    action="store_true",
    help="fold ImageNet's normalisation into the patch embedding, so that the "
    "usual VideoMAE preprocessing gives the same features; otherwise the "
    "written preprocessor leaves pixels in [0, 1]",
  )
  parser.add_argument(
    "--clip",
    metavar="VIDEO",
    help="video for the check (default: the sample video)",
  )
  return parser.parse_args(argv)


def convert(args: argparse.Namespace) -> None:
  """Reads, writes and checks.

  Raises:
    OutputFolderError: DST is in a bucket.
    WeightsError: the weights cannot be read or written, see weights.formats, or
      the check failed.
  """
  from marlin_jax.inference import classifier
  from marlin_jax.weights import formats, run_checkpoint

  folders.check_local(args.dst)
  if classifier.is_classifier(args.src):
    _convert_classifier(args)
    return
  target_module = formats.module_of(args.target_format)

  # --- Read -------------------------------------------------------------------
  source = formats.resolve(args.src, full=not args.encoder_only)
  options = {
    name: getattr(args, name)
    for name in _READ_OPTIONS
    if getattr(args, name) is not None
  }
  read_options = dict(options)
  if args.drop_classifier:
    read_options["drop_classifier"] = True
  weights = formats.read(source, args.source_format, **read_options)
  print(f"{source}: {describe(weights.architecture)}")
  converted = weights.encoder_only() if args.encoder_only else weights

  # --- Write ------------------------------------------------------------------
  target = Path(args.dst).expanduser()
  clip = _clip(args.clip, converted.architecture)
  write_options = {}
  if args.hf_class:
    write_options["kind"] = _HF_CLASSES[args.hf_class]
  if args.fold_input:
    write_options["fold_input"] = True
  with _in_place_of(target, source, overwrite=args.overwrite):
    notices = formats.call(
      target_module.write,
      target,
      f"writing {args.target_format}",
      write_options,
      converted,
    )
  if run_checkpoint.has_sound(source):
    notices.append(
      "the run's encoder of sound is not written: features of sound need the "
      "workdir"
    )
  for notice in notices:
    print(f"note: {notice}")

  # --- Check ------------------------------------------------------------------
  back = formats.read(
    target,
    args.target_format,
    # From the source, what files of the target's format do not hold.
    **{
      name: getattr(converted.architecture, name)
      for name in _NOT_IN_FILE.get(args.target_format, ())
    },
  )
  print(f"{target}: {describe(back.architecture)}")
  check(
    (source, args.source_format or formats.format_of(source), weights),
    (target, args.target_format, back),
    clip,
  )


def _convert_classifier(args: argparse.Namespace) -> None:
  """Exports a trained classifier and compares its predictions.

  Raises:
    WeightsError: the head cannot be exported, or the check failed.
  """
  from marlin_jax.inference.classifier import VideoClassifier
  from marlin_jax.records.folders import write_bytes
  from marlin_jax.weights import huggingface
  from marlin_jax.weights.weights import WeightsError

  if args.target_format not in ("hf", "stablehlo"):
    raise WeightsError(
      f"--to={args.target_format}: a classifier converts to hf or stablehlo"
    )
  model = VideoClassifier.load(args.src)
  kernel, bias = model.linear_layer
  names, kind = model.description.names, model.description.kind
  target = Path(args.dst).expanduser()
  clip = _clip(args.clip, model.weights.architecture)
  with _in_place_of(target, Path(args.src), overwrite=args.overwrite):
    if args.target_format == "hf":
      notices = huggingface.write(
        model.weights,
        target,
        kind=_HF_CLASSES["classification"],
        fold_input=args.fold_input,
        classifier=huggingface.Classifier(kernel, bias, names, kind),
      )
      for notice in notices:
        print(f"note: {notice}")
      written = _transformers_predictions(target, clip, kind)
    else:
      data = model.exported(("cpu", "cuda", "tpu")).serialize()
      write_bytes(target, data)
      written = _stablehlo_predictions(target, clip)
  noun = "numbers" if kind == "value" else "probabilities"
  print(f"{target}: {noun} of {', '.join(names)}")
  if written is None:
    return
  expected = model.probabilities(np.asarray(model.outputs(clip)))
  worst = float(np.abs(written - expected).max())
  print(f"  {noun}: largest difference {worst:.1e}")
  if not worst <= TOLERANCE * max(1.0, float(np.abs(expected).max())):
    raise WeightsError(f"the check failed: do not use {target}")


def _stablehlo_predictions(path: Path, clip: np.ndarray) -> np.ndarray:
  from jax import export

  exported = export.deserialize(bytearray(path.read_bytes()))
  return np.asarray(exported.call(clip))[0]


def _transformers_predictions(
  path: Path, clip: np.ndarray, kind: str
) -> np.ndarray | None:
  """Returns (K,) from transformers; None if it is not installed."""
  from marlin_jax.inference.classifier import activated
  from marlin_jax.weights import huggingface

  transformers = _transformers()
  if transformers is None:
    return None
  import torch

  network = transformers.AutoModelForVideoClassification.from_pretrained(path)
  architecture = huggingface.read(path, drop_classifier=True).architecture
  video = torch.from_numpy(_as_expected(clip, architecture))
  with torch.no_grad():
    logits = network.eval()(video.permute(0, 1, 4, 2, 3)).logits[0]
  return activated(logits.numpy(), kind)


_HF_CLASSES = {
  "model": "VideoMAEModel",
  "pretraining": "VideoMAEForPreTraining",
  "classification": "VideoMAEForVideoClassification",
}


# Files that the formats write to a folder.
_FOLDER_FILES = {"config.json", "model.safetensors", "preprocessor_config.json"}
# Arguments of a format's `read` that its files do not hold.
_NOT_IN_FILE = {
  "marlin": ("num_heads", "dec_num_heads", "image_size"),
  "videomae": ("num_heads", "dec_num_heads", "image_size", "num_frames"),
}


def describe(architecture) -> str:
  """Returns parts and sizes of a network in one line."""
  a = architecture
  parts = [f"encoder {a.width}/{a.depth}/{a.num_heads}"]
  if a.has_decoder:
    parts.append(f"decoder {a.dec_width}/{a.dec_depth}/{a.dec_num_heads}")
  if a.has_discriminator:
    parts.append(f"discriminator {a.disc_hidden}")
  pixels = "ImageNet-normalised" if a.imagenet_input else "in [0, 1]"
  parts.append(
    f"{a.num_frames} frames of {a.image_size} in patches of {a.patch_size}, "
    f"pixels {pixels}"
  )
  return ", ".join(parts)


@contextlib.contextmanager
def _in_place_of(
  target: Path, source: Path, *, overwrite: bool
) -> Iterator[None]:
  """Moves the result of an earlier conversion aside while another is written.

  It is removed when the block succeeds, and put back when it fails. Nothing
  else is ever removed.

  Raises:
    WeightsError: the target exists and may not be replaced.
  """
  if not target.exists():
    yield
    return
  _check_replaceable(target, source, overwrite=overwrite)
  with tempfile.TemporaryDirectory(
    prefix=f".{target.name}-", dir=target.parent
  ) as folder:
    before = Path(folder) / target.name
    target.rename(before)
    try:
      yield
    except BaseException:
      if target.is_dir():
        shutil.rmtree(target)
      before.replace(target)
      raise


def _check_replaceable(target: Path, source: Path, *, overwrite: bool) -> None:
  """Raises WeightsError unless a target is the result of a conversion."""
  from marlin_jax.weights import formats
  from marlin_jax.weights.weights import WeightsError

  if not overwrite:
    raise WeightsError(f"{target} exists: choose another name, or --overwrite")
  if source.resolve().is_relative_to(target.resolve()):
    raise WeightsError(f"{target} holds SRC itself: choose another name")
  if not target.is_dir():
    if target.suffix not in (*formats.FILE_SUFFIXES, ".stablehlo"):
      raise WeightsError(
        f"{target} is not a file of weights: choose another name"
      )
    return
  names = {entry.name for entry in target.iterdir()}
  if names == {"checkpoints"}:
    # A converted checkpoint is of step 0; those of a run are kept.
    inner = {entry.name for entry in (target / "checkpoints").iterdir()}
    foreign = inner - {"0"}
  else:
    foreign = names - _FOLDER_FILES
  if foreign or target.is_symlink():
    raise WeightsError(
      f"{target} is not the result of a conversion"
      + (f", it holds {min(foreign)!r}" if foreign else "")
      + ": choose another name"
    )


# --- The check ----------------------------------------------------------------


def check(before, after, clip: np.ndarray) -> None:
  """Compares source and target on a clip and prints the differences.

  Args:
    before: path, format and Weights of the source.
    after: path, format and Weights of the target, read back.
    clip: uint8 (1, T, S, S, 3).

  Raises:
    WeightsError: an output differs by more than TOLERANCE.
  """
  from marlin_jax.weights.weights import WeightsError

  outputs, rows = [], []
  for path, format, weights in (before, after):
    ours = _outputs(weights, clip)
    outputs.append(ours)
    theirs, network = _torch_outputs(path, format, weights, clip)
    rows += [
      (f"{name} of {path}: JAX against {network}", ours[name] - theirs[name])
      for name in theirs
    ]
  # The outputs of the target, which may lack the source's decoder.
  rows += [
    (f"{name}: before against after", outputs[0][name] - outputs[1][name])
    for name in outputs[1]
  ]
  worst = 0.0
  for row, difference in rows:
    largest = float(np.abs(difference).max())
    worst = max(worst, largest)
    print(f"  {row}: largest difference {largest:.1e}")
  if not worst <= TOLERANCE:
    raise WeightsError(
      f"the check failed: {worst:.1e} is more than {TOLERANCE:.0e}. "
      f"{after[0]} is not the same network; do not use it."
    )


def _clip(path: str | None, architecture) -> np.ndarray:
  """Returns a clip of a real video, or noise if there is no video.

  Returns:
    uint8 (1, T, S, S, 3).
  """
  from data_prep import assets
  from marlin_jax.inference import face_windows

  settings = face_windows.WindowSettings(
    clip=architecture.clip, image_size=architecture.image_size
  )
  try:
    path = path or assets.fetch_sample_videos() / "carphone_pristine.mp4"
    return next(face_windows.read_windows(path, settings)).frames[None]
  except assets.AssetError as e:
    print(f"note: checked on noise, since there is no sample video: {e}")
  size = architecture.image_size
  shape = (1, architecture.num_frames, size, size, 3)
  return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def _visible(architecture) -> np.ndarray:
  """Returns bool (N,), a fixed random tenth of the tokens."""
  num_tokens = architecture.tubelets.num_tokens
  order = np.random.default_rng(0).permutation(num_tokens)
  return order < max(num_tokens // 10, 1)


def _outputs(weights, clip: np.ndarray) -> dict[str, np.ndarray]:
  """Returns token features (1, N, D) and, with a decoder, predictions."""
  import jax
  from flax import nnx

  from marlin_jax.inference.clip_features import to_tokens
  from marlin_jax.inference.marlin import Marlin

  marlin = Marlin(weights)
  outputs = {
    "features": np.asarray(marlin.extract_features(clip, keep_seq=True))
  }
  if weights.architecture.has_decoder:
    visible = _visible(weights.architecture)
    shown, masked = np.flatnonzero(visible), np.flatnonzero(~visible)
    tokens = to_tokens(clip, weights.architecture)
    graphdef, state = nnx.split(marlin.mae)
    predict = jax.jit(lambda state, *args: nnx.merge(graphdef, state)(*args))
    outputs["predictions"] = np.asarray(
      predict(state, tokens[:, shown], shown[None], masked[None])
    )
  return outputs


def _torch_outputs(path: Path, format: str, weights, clip: np.ndarray):
  """Returns `_outputs` of a PyTorch file from PyTorch.

  Returns:
    The outputs, {} for formats without PyTorch; and the library that computed
    them.
  """
  from marlin_jax.weights import marlin_pytorch, torch_network, videomae

  loaders = {
    "marlin": marlin_pytorch.load_state,
    "videomae": videomae.load_state,
  }
  if format == "hf":
    return _transformers_outputs(path, weights, clip)
  if format not in loaders:
    return {}, ""
  # PyTorch is installed, since these files have been read.
  network = torch_network.TorchNetwork(
    loaders[format](path), weights.architecture, weights.arrays
  )
  video = _as_expected(clip, weights.architecture)
  outputs = {"features": network.features(video)}
  if weights.architecture.has_decoder:
    predictions = network.predictions(video, _visible(weights.architecture))
    if format == "videomae":
      predictions = _colours_first(predictions)
    outputs["predictions"] = predictions
  return outputs, "PyTorch"


def _transformers():
  """Returns the module; None, with a note, if it is not installed."""
  try:
    import torch  # noqa: F401
    import transformers
  except ImportError:
    print(
      "note: not checked against transformers, which is not installed: "
      "pip install transformers torch"
    )
    return None
  transformers.utils.logging.disable_progress_bar()
  return transformers


def _transformers_outputs(path: Path, weights, clip: np.ndarray):
  transformers = _transformers()
  if transformers is None:
    return {}, ""
  import torch

  kind = transformers.AutoConfig.from_pretrained(path).architectures[0]
  network = getattr(transformers, kind).from_pretrained(path).eval()
  video = _as_expected(clip, weights.architecture)
  video = torch.from_numpy(video).permute(0, 1, 4, 2, 3)  # (B, T, C, H, W)
  with torch.no_grad():
    if kind == "VideoMAEForPreTraining":
      masked = torch.from_numpy(~_visible(weights.architecture))[None]
      logits = network(video, bool_masked_pos=masked).logits.numpy()
      outputs = {
        "features": network.videomae(video).last_hidden_state.numpy(),
        "predictions": _colours_first(logits),
      }
    elif kind == "VideoMAEForVideoClassification":
      tokens = network.videomae(video).last_hidden_state
      outputs = {"features": network.fc_norm(tokens).numpy()}
    else:
      outputs = {"features": network(video).last_hidden_state.numpy()}
  return outputs, "transformers"


def _as_expected(clip: np.ndarray, architecture) -> np.ndarray:
  """Returns uint8 clips as float32, normalised as the network expects."""
  from marlin_jax.data.clip_geometry import IMAGENET_MEAN, IMAGENET_STD

  video = clip.astype(np.float32) / 255
  if architecture.imagenet_input:
    video = (video - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
  return video


def _colours_first(tokens: np.ndarray) -> np.ndarray:
  """Reorders pixels from VideoMAE's order (pt ph pw c) to ours (c pt ph pw)."""
  by_pixel = tokens.reshape(*tokens.shape[:-1], -1, 3)
  return by_pixel.swapaxes(-1, -2).reshape(tokens.shape)


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code: 0, 1 for an error, 130 when interrupted."""
  args = parse_args(argv)
  from absl import logging

  logging.set_verbosity(logging.ERROR)  # Orbax logs every file
  return cli.run_command(
    lambda: convert(args), "DST is not written, or not checked: do not use it."
  )


if __name__ == "__main__":
  sys.exit(main())
