"""Lip synchronisation: draws a face's mouth anew, to fit a sound.

The four modes, in the order in which they are needed; see docs/LIPSYNC.md.
Any value of the configuration can be overridden: --config.generator.lr=2e-4.

  --mode=train_expert  trains the network that judges whether lips and sound are
    in sync, on a data set with sound at 25 frames per second (data_prep.prepare
    --sound --fps=25). Needs --data. With --expert it starts from the weights of
    another expert.

  python -m marlin_jax.eval.ls --config=configs/eval_ls.py \\
    --mode=train_expert --data=DATA --workdir=runs/ls_expert

  --mode=train  trains the generator on the same data set. Needs --data,
    --expert and, for config.generator.kind=marlin, --checkpoint.

  python -m marlin_jax.eval.ls --config=configs/eval_ls.py --mode=train \\
    --data=DATA --expert=runs/ls_expert --checkpoint=runs/b --workdir=runs/ls

  --mode=generate  writes a video whose face speaks the words of a sound. Needs
    --generator, --video and --output; also --sound, unless the video's own
    sound is used. With --pairs in place of --video, it writes a folder of
    videos, one for each line of a list.

  python -m marlin_jax.eval.ls --config=configs/eval_ls.py --mode=generate \\
    --generator=runs/ls --video=face.mp4 --sound=words.wav --output=said.mp4

  python -m marlin_jax.eval.ls --config=configs/eval_ls.py --mode=generate \\
    --generator=wav2lip.pth --pairs=lrs2.txt --root=LRS2/main \\
    --output=runs/lrs2

  --mode=score  measures how well lips and sound of videos agree and, with
    --real, how similar the faces are to those of real videos. Needs --videos,
    --output and either --syncnet or --expert.

  python -m marlin_jax.eval.ls --config=configs/eval_ls.py --mode=score \\
    --videos=GENERATED --real=REAL --syncnet=syncnet_v2.model \\
    --output=runs/ls_score

Training can be stopped at any time; Ctrl-C saves a checkpoint first. The same
command resumes it. The workdir contains config.json, metrics.jsonl,
tensorboard/, checkpoints/ and pictures/. Exit codes: 0 done; 1 refused, and the
message says what to do; 75 training ended early and can be restarted; 128 +
signal: stopped by a signal, training after saving a checkpoint.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import ConfigDict

from marlin_jax.devices import xla_flags
from marlin_jax.eval import command
from marlin_jax.lipsync import configuration
from marlin_jax.records import cli, folders
from marlin_jax.training import config_flags

flags.adopt_module_key_flags(command)  # --checkpoint, --config, --data, ...

# Mode -> its required and its optional flags.
_MODES = {
  "train_expert": (("data",), ("expert", "workdir")),
  "train": (("data", "expert"), ("checkpoint", "workdir")),
  "generate": (("generator", "output"), ("video", "sound", "pairs", "root")),
  "score": (
    ("videos", "output"),
    ("syncnet", "expert", "real", "originals", "features", "face_crops"),
  ),
}
# Flags that only some modes take, in the order of messages about them.
_MODE_FLAGS = (
  *("data", "expert", "checkpoint", "generator", "video", "sound"),
  *("pairs", "root"),
  *("output", "videos", "real", "originals", "syncnet", "features"),
  "face_crops",
  "workdir",
)
# Flags whose values are existing paths; --checkpoint and --features may also
# name a published model.
_INPUT_PATHS = (
  *("expert", "generator", "video", "sound", "pairs", "root"),
  *("syncnet", "originals"),
)

_MODE = flags.DEFINE_enum("mode", None, list(_MODES), "What to do; see above.")
flags.DEFINE_string(
  "expert",
  None,
  "The sync expert: the workdir of --mode=train_expert, or Wav2Lip's "
  "lipsync_expert.pth. --mode=train_expert starts from it, and --mode=score "
  "takes it instead of --syncnet; its scores "
  "are not LSE-D and LSE-C.",
)
flags.DEFINE_string(
  "generator",
  None,
  "The generator: the workdir of --mode=train, or Wav2Lip's wav2lip.pth.",
)
flags.DEFINE_string(
  "video", None, "A video that shows a face, in any format of FFmpeg."
)
flags.DEFINE_string(
  "sound",
  None,
  "The sound that the face speaks: an audio file, or a video with sound, in "
  "any format of FFmpeg. Default: the sound of --video.",
)
flags.DEFINE_string(
  "pairs",
  None,
  "A list of videos to generate, in place of --video and --sound: each line "
  "names sound and video, separated by a space, as Wav2Lip's "
  "evaluation/test_filelists do. Resumed by the same command.",
)
flags.DEFINE_string(
  "root",
  None,
  "Folder that the paths in --pairs are relative to. Default: the list's own.",
)
flags.DEFINE_string(
  "output",
  None,
  "The MP4 to write; with --pairs a folder, for 0.mp4, 1.mp4, ... by line and "
  "pairs.json. For --mode=score a folder, for scores.json, scores.csv, "
  "scores.txt and offsets.png.",
)
flags.DEFINE_list(
  "videos",
  [],
  "Videos with sound to score: files or folders, separated by commas.",
)
flags.DEFINE_list(
  "real",
  [],
  "Real videos to compare the faces of --videos with: files or folders, "
  "separated by commas.",
)
flags.DEFINE_string(
  "originals",
  None,
  "Folder of the videos that --videos were generated from with their own "
  "sound, of the same names: PSNR, SSIM and landmark distance of the mouths.",
)
flags.DEFINE_string(
  "syncnet",
  None,
  "SyncNet's published weights, syncnet_v2.model, for LSE-D and LSE-C.",
)
flags.DEFINE_string(
  "features",
  None,
  "Features to compare faces by: Inception as an ONNX file, for FID (the "
  "docstring of marlin_jax/lipsync/scoring/frame_features.py says how to "
  "export it), or MARLIN weights, as of --checkpoint. Default: mean colours. "
  "Only Inception's distance is called FID.",
)
flags.DEFINE_bool(
  "face_crops",
  False,
  "The videos to score are face crops already, as in LRS2: faces are neither "
  "tracked nor cropped. Otherwise SyncNet gets the crops of its own pipeline, "
  "and an expert those that it was trained on.",
)


def _flag_problems(config: ConfigDict, mode: str) -> list[str]:
  """Returns a message for each flag that is missing, unused or wrong."""
  set_flags = {name for name in _MODE_FLAGS if flags.FLAGS[name].value}
  required, optional = _MODES[mode]
  problems = [
    f"--{name} is missing" for name in required if name not in set_flags
  ]
  problems += [
    f"--{name} has no meaning"
    for name in _MODE_FLAGS
    if name in set_flags and name not in (*required, *optional)
  ]
  has_encoder = config.generator.kind == "marlin"
  if mode == "train" and has_encoder != ("checkpoint" in set_flags):
    problem = "is missing" if has_encoder else "has no meaning"
    problems.append(
      f"--checkpoint {problem} with config.generator.kind="
      f"{config.generator.kind!r}"
    )
  if mode == "generate":
    if len(set_flags & {"video", "pairs"}) != 1:
      problems.append("expected one of --video and --pairs")
    for name, owner in (("sound", "video"), ("root", "pairs")):
      if name in set_flags and owner not in set_flags:
        problems.append(f"--{name} has no meaning without --{owner}")
  if mode == "score" and len(set_flags & {"syncnet", "expert"}) != 1:
    problems.append("expected one of --syncnet and --expert")
  problems += [
    f"--{name}={flags.FLAGS[name].value}: there is no such file or folder"
    for name in _INPUT_PATHS
    if name in set_flags & {*required, *optional}
    and not os.path.exists(flags.FLAGS[name].value)
  ]
  output = flags.FLAGS.output
  if output and folders.is_remote(output):
    problems.append(f"--output={output} is in a bucket, expected a disk")
  return [f"{problem} (--mode={mode})" for problem in problems]


def main(argv: Sequence[str]) -> int | None:
  """Runs the command and returns its exit code."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  logging.set_verbosity(logging.FATAL)  # orbax logs every save
  config, mode = config_flags.config(configuration.validate), _MODE.value
  if problems := _flag_problems(config, mode):
    sys.exit("error: " + "\nerror: ".join(problems))
  if mode == "generate":
    return cli.run_command(lambda: _generate(config), "No video was written.")
  if mode == "score":
    return cli.run_command(lambda: _score(config), "No scores were written.")
  return _train(config, mode)


def _train(config: ConfigDict, mode: str) -> None:
  # Imported here because the imports take seconds: --help and bad flags answer
  # at once.
  from marlin_jax.lipsync.training.expert_training import train_expert
  from marlin_jax.lipsync.training.generator_training import train_generator
  from marlin_jax.training import loop

  if config.deterministic:
    xla_flags.set_deterministic()
  paths, workdir = flags.FLAGS, config_flags.workdir()
  if mode == "train_expert":
    train = functools.partial(
      train_expert, config, paths.data, workdir, paths.expert
    )
  else:
    train = functools.partial(
      train_generator,
      config,
      paths.data,
      workdir,
      paths.expert,
      paths.checkpoint,
    )
  loop.run_training(train)


def _generate(config: ConfigDict) -> None:
  from marlin_jax.lipsync.generation import pairs
  from marlin_jax.lipsync.generation.generate import load_generator, run

  paths = flags.FLAGS
  drawer = load_generator(
    paths.generator, dtype=config.dtype, attention=config.attention
  )
  if paths.pairs:
    root = paths.root or os.path.dirname(os.path.abspath(paths.pairs))
    pairs.run(drawer, paths.pairs, root, paths.output)
  else:
    run(drawer, paths.video, paths.sound, paths.output)


def _score(config: ConfigDict) -> None:
  from marlin_jax.lipsync.networks import build, published
  from marlin_jax.lipsync.scoring import report
  from marlin_jax.lipsync.scoring.frame_features import open_features
  from marlin_jax.lipsync.scoring.judges import ExpertJudge, SyncNetJudge
  from marlin_jax.lipsync.scoring.score import score

  options = flags.FLAGS
  if options.syncnet:
    judge = SyncNetJudge(published.read(published.SYNCNET, options.syncnet))
  else:
    expert = build.read_expert(options.expert, dtype=config.dtype)
    judge = ExpertJudge(expert, options.expert)
  results = score(
    options.videos,
    options.output,
    judge,
    reals=options.real,
    features=open_features(options.features) if options.features else None,
    originals=options.originals,
    are_face_crops=options.face_crops,
  )
  print(f"\n{report.table(results)}\n")
  print(f"{options.output}/scores.json holds all scores")


if __name__ == "__main__":
  config_flags.run(main, "mode")
