"""Lip synchronisation: a face that says what another sound says.

Four modes, in the order in which they are needed; docs/LIPSYNC.md says more.
Any value of the configuration can be overridden: --config.generator.lr=2e-4.

  --mode=train_expert  trains the network that tells whether lips and sound
    agree, on a data set with sound at 25 frames a second (data_prep.prepare
    --sound --fps=25). Needs --data.

  python -m marlin_jax.eval.ls --config=configs/eval_ls.py \\
    --mode=train_expert --data=DATA --workdir=runs/ls_expert

  --mode=train  trains the generator on the same data. Needs --data, --expert
    and, for config.generator.kind=marlin, --checkpoint.

  python -m marlin_jax.eval.ls --config=configs/eval_ls.py --mode=train \\
    --data=DATA --expert=runs/ls_expert --checkpoint=runs/b --workdir=runs/ls

  --mode=generate  writes a video of a face with its mouth drawn anew. Needs
    --generator, --video and --output; --sound where it is not the video's own.

  python -m marlin_jax.eval.ls --config=configs/eval_ls.py --mode=generate \\
    --generator=runs/ls --video=face.mp4 --sound=words.wav --output=said.mp4

  --mode=score  measures how well lips and sound of videos agree and, with
    --real, how much the faces look like those. Needs --videos, --output and
    either --syncnet or --expert.

  python -m marlin_jax.eval.ls --config=configs/eval_ls.py --mode=score \\
    --videos=GENERATED --real=REAL --syncnet=syncnet_v2.model \\
    --output=runs/ls_score

Training may be stopped at any moment, Ctrl-C saves first: the same command goes
on. The workdir holds config.json, metrics.jsonl, tensorboard/, checkpoints/ and
pictures/. Exit codes: 0 done; 1 cannot be done as asked, see the message; 75
broke off, to be started again; 128 + signal: saved and ended because of it.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import ConfigDict

from marlin_jax.eval import command
from marlin_jax.lipsync import configuration
from marlin_jax.records.cli import UserError
from marlin_jax.training import config_flags

flags.adopt_module_key_flags(command)  # --checkpoint, --config, --data, ...

# Mode -> the flags that it needs, and those that it takes.
_MODES = {
  "train_expert": (("data",), ("workdir",)),
  "train": (("data", "expert"), ("checkpoint", "workdir")),
  "generate": (("generator", "video", "output"), ("sound",)),
  "score": (
    ("videos", "output"),
    ("syncnet", "expert", "real", "features", "face_crops"),
  ),
}
_OURS = ("data", "expert", "checkpoint", "generator", "video", "sound") + (
  *("output", "videos", "real", "syncnet", "features", "face_crops"),
  "workdir",
)
# Given by a path, where something must be.
_READ = ("expert", "generator", "video", "sound", "syncnet", "features")

_MODE = flags.DEFINE_enum("mode", None, list(_MODES), "What to do; see above.")
flags.DEFINE_string(
  "expert",
  None,
  "The sync expert: the workdir of --mode=train_expert, or Wav2Lip's "
  "lipsync_expert.pth. For --mode=score in place of --syncnet; its numbers are "
  "then not LSE-D and LSE-C.",
)
flags.DEFINE_string(
  "generator",
  None,
  "The generator: the workdir of --mode=train, or Wav2Lip's wav2lip.pth.",
)
flags.DEFINE_string("video", None, "A video that shows a face, of any format.")
flags.DEFINE_string(
  "sound",
  None,
  "What the face shall say: a sound file of any format, or a video for the "
  "sound in it. Default: the sound of --video.",
)
flags.DEFINE_string(
  "output",
  None,
  "The MP4 to write; for --mode=score a folder for scores.json, scores.csv, "
  "scores.txt and offsets.png.",
)
flags.DEFINE_list(
  "videos", [], "Videos with sound to be scored: files or folders, with commas."
)
flags.DEFINE_list(
  "real", [], "Real videos to compare the faces of --videos with."
)
flags.DEFINE_string(
  "syncnet",
  None,
  "SyncNet's published weights, syncnet_v2.model: for LSE-D and LSE-C.",
)
flags.DEFINE_string(
  "features",
  None,
  "Inception's features as an ONNX file, for FID; how to make it: the "
  "docstring of marlin_jax/lipsync/scoring/frame_features.py. Or weights of "
  "MARLIN; default: mean colours. Their numbers are no FID and are not called "
  "so.",
)
flags.DEFINE_bool(
  "face_crops",
  False,
  "The videos to be scored show face crops already, as LRS2 does: whole frames "
  "are looked at.",
)


def _problems(config: ConfigDict, mode: str) -> list[str]:
  """What is missing on the command line, or has no meaning, all of it."""
  given = {name for name in _OURS if flags.FLAGS[name].value}
  needed, taken = _MODES[mode]
  problems = [f"--{name} is missing" for name in needed if name not in given]
  problems += [
    f"--{name} has no meaning"
    for name in _OURS
    if name in given and name not in (*needed, *taken)
  ]
  has_encoder = config.generator.kind == "marlin"
  if mode == "train" and has_encoder != ("checkpoint" in given):
    what = "is missing" if has_encoder else "has no meaning"
    problems.append(
      f"--checkpoint {what} with config.generator.kind="
      f"{config.generator.kind!r}"
    )
  if mode == "score" and len(given & {"syncnet", "expert"}) != 1:
    problems.append("expected one of --syncnet and --expert")
  problems += [
    f"--{name}={flags.FLAGS[name].value}: there is no such file or folder"
    for name in _READ
    if name in given & {*needed, *taken}
    and not os.path.exists(flags.FLAGS[name].value)
  ]
  return [f"{problem} (--mode={mode})" for problem in problems]


def main(argv: Sequence[str]) -> None:
  """Does what --mode says."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  logging.set_verbosity(logging.FATAL)  # orbax tells of every save
  config, mode = config_flags.config(configuration.validate), _MODE.value
  if problems := _problems(config, mode):
    sys.exit("error: " + "\nerror: ".join(problems))
  if mode == "generate":
    _generate(config)
  elif mode == "score":
    _score(config)
  else:
    _train(config, mode)


def _train(config: ConfigDict, mode: str) -> None:
  # Imported here: they take seconds, which --help and bad flags need not wait.
  from marlin_jax.lipsync.training.expert_training import train_expert
  from marlin_jax.lipsync.training.generator_training import train_generator
  from marlin_jax.training import loop

  given, workdir = flags.FLAGS, config_flags.workdir()
  if mode == "train_expert":
    train = functools.partial(train_expert, config, given.data, workdir)
  else:
    train = functools.partial(
      train_generator,
      config,
      given.data,
      workdir,
      given.expert,
      given.checkpoint,
    )
  loop.run_training(train)


def _generate(config: ConfigDict) -> None:
  from marlin_jax.lipsync.generation.generate import (
    load_generator,
    run,
  )

  given = flags.FLAGS
  try:
    generator, framing = load_generator(
      given.generator, dtype=config.dtype, attention=config.attention
    )
    run(generator, given.video, given.sound, given.output, framing=framing)
  except (UserError, RuntimeError) as e:
    sys.exit(f"error: {e}")


def _score(config: ConfigDict) -> None:
  from marlin_jax.lipsync.networks import build, published
  from marlin_jax.lipsync.scoring import report
  from marlin_jax.lipsync.scoring.frame_features import open_features
  from marlin_jax.lipsync.scoring.judges import ExpertJudge, SyncNetJudge
  from marlin_jax.lipsync.scoring.score import score

  given = flags.FLAGS
  try:
    if given.syncnet:
      judge = SyncNetJudge(published.read(published.SYNCNET, given.syncnet))
    else:
      judge = ExpertJudge(
        build.read_expert(given.expert, dtype=config.dtype), given.expert
      )
    results = score(
      given.videos,
      given.output,
      judge,
      reals=given.real,
      features=open_features(given.features) if given.features else None,
      crop_face=not given.face_crops,
    )
  except (UserError, RuntimeError) as e:
    sys.exit(f"error: {e}")
  print(
    f"\n{report.table(results)}\n\n{given.output}/scores.json has more"
  )


if __name__ == "__main__":
  for required in ("config", "mode"):
    flags.mark_flag_as_required(required)
  app.run(main, flags_parser=config_flags.parse)
