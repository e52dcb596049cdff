"""The command marlin_jax.eval.ls."""

import re
import signal
import subprocess
import sys

import pytest

from configs import eval_ls
from tests.support import compile_cache
from tests.support.files import arrays_of, rows_of
from tests.support.processes import ROOT, run_here

TINY = {
  "expert.num_frames": 5,
  "expert.width": 1 / 32,
  "expert.batch_size": 2,
  "expert.num_steps": 12,
  "expert.eval_batches": 1,
  "data.val": "train",
  "log_steps": 1,
  "checkpoint_steps": 2,
}


def command(mode, *flags, **overrides):
  values = TINY | overrides
  return [
    sys.executable,
    "-m",
    "marlin_jax.eval.ls",
    "--config=configs/eval_ls.py",
    f"--mode={mode}",
    *flags,
    *(f"--config.{key}={value}" for key, value in values.items()),
  ]


def run(*args, **overrides):
  return subprocess.run(
    command(*args, **overrides),
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
    timeout=250,
  )


def train(data, workdir):
  """Trains an expert in this process."""
  from marlin_jax.lipsync.training import expert_training

  config = eval_ls.get_config()
  config.update_from_flattened_dict(TINY)
  return run_here(
    lambda: expert_training.train_expert(config, str(data), str(workdir))[1]
  )


def end_at(signum, pattern, args, env):
  """Runs a command, sends a signal after a matching line of its output.

  Returns:
    The exit code.
  """
  with subprocess.Popen(
    args, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True
  ) as process:
    for line in process.stdout:
      if re.match(pattern, line):
        break
    process.send_signal(signum)
    process.stdout.read()  # a full pipe would block it
  return process.returncode


def losses_of(workdir):
  return {
    row["step"]: row["train/loss_sync"]
    for row in rows_of(workdir)
    if "train/loss_sync" in row
  }


@pytest.mark.slow
def test_killed_interrupted_and_resumed_gives_the_same_bits(
  talking_person, tmp_path
):
  workdir, undisturbed = tmp_path / "disturbed", tmp_path / "undisturbed"
  flags = f"--data={talking_person}", f"--workdir={workdir}"
  args = command("train_expert", *flags)
  env = compile_cache.private_copy(tmp_path / "cache")
  # Step 2 has a checkpoint; later ones may exist, the last one incomplete.
  assert end_at(signal.SIGKILL, "step 3/12:", args, env) == -signal.SIGKILL
  # Ctrl-C saves the current step.
  code = end_at(signal.SIGINT, r"step \d+/12:", args, env)
  assert code == 128 + signal.SIGINT
  last = train(talking_person, workdir)
  assert last.returncode == 0
  assert "resumed from step" in last.stdout
  assert train(talking_person, undisturbed).returncode == 0
  assert losses_of(workdir) == losses_of(undisturbed)
  got, want = arrays_of(workdir, 12), arrays_of(undisturbed, 12)
  assert any(key.startswith("['expert']['stats']") for key in want)
  assert got.keys() == want.keys()
  for key, value in want.items():
    assert value.tobytes() == got[key].tobytes(), key


@pytest.mark.parametrize(
  ("mode", "flags", "expected"),
  [
    ("train_expert", [], ["--data is missing"]),
    (
      "train",
      ["--data=DATA", "--expert=NONE", "--sound=a.wav"],
      [
        "--sound has no meaning",
        "--checkpoint is missing with config.generator.kind='marlin'",
        "--expert=NONE: there is no such file or folder",
      ],
    ),
    (
      "generate",
      ["--output=OUT", "--sound=README.md", "--root=docs"],
      [
        "--generator is missing",
        "expected one of --video and --pairs",
        "--sound has no meaning without --video",
        "--root has no meaning without --pairs",
      ],
    ),
    (
      "score",
      # A published model is no path.
      ["--videos=a.mp4", "--features=marlin_vit_base_ytf", "--output=gs://b/c"],
      [
        "expected one of --syncnet and --expert",
        "--output=gs://b/c is in a bucket, expected a disk",
      ],
    ),
  ],
)
def test_all_bad_flags_of_a_mode_are_reported_at_once(mode, flags, expected):
  result = run(mode, *flags)
  assert result.returncode == 1
  lines = result.stderr.strip().splitlines()
  assert [line.partition(" (--mode")[0] for line in lines] == [
    f"error: {problem}" for problem in expected
  ]


def test_a_data_set_without_sound_is_a_clear_error(tmp_path):
  from tests.support import made_dataset

  data = made_dataset.make(
    tmp_path / "data",
    {"a.mp4": [made_dataset.a_record("a.mp4", num_frames=20)]},
  )
  result = run(
    "train_expert", f"--data={data}", f"--workdir={tmp_path / 'run'}"
  )
  assert result.returncode == 1
  assert "prepare the videos again" in result.stderr
  assert "--sound --fps=25" in result.stderr
  assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
  ("mode", "flags"),
  [
    ("generate", ["--generator={bad}", "--video={bad}"]),
    ("score", ["--syncnet={bad}", "--videos={bad}"]),
  ],
)
def test_unreadable_weights_are_a_clear_error(mode, flags, tmp_path):
  bad = tmp_path / "weights.pth"
  bad.write_text("no weights")
  output = tmp_path / "out.mp4"
  result = run(
    mode, *(flag.format(bad=bad) for flag in flags), f"--output={output}"
  )
  assert result.returncode == 1
  assert f"error: {bad}" in result.stderr
  assert "Traceback" not in result.stderr
  assert not output.exists()
