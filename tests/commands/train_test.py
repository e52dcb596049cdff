"""The train command: results, resuming, signals and refusals."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from configs import pretrain_b
from marlin_jax.data import sampling
from marlin_jax.data.clip_geometry import Tubelets
from marlin_jax.inference.marlin import Marlin
from marlin_jax.weights import run_checkpoint
from tests.support import compile_cache, made_dataset
from tests.support.files import arrays_of, rows_of
from tests.support.made_dataset import a_record
from tests.support.processes import ROOT
from tests.support.training_runs import (
  TINY,
  command,
  metrics_of,
  refused,
  run,
  train,
  without_step_4,
)
from tests.support.videos import shared_video

PART_OF_TIME = "goodput/(?!total|down).*_secs"


@pytest.fixture(scope="module")
def finished(sample_dataset, tmp_path_factory):
  """Returns the workdir and output of an undisturbed run of six steps."""
  workdir = tmp_path_factory.mktemp("finished")
  result = run(workdir, **{"data.path": sample_dataset})
  assert result.returncode == 0, result.stderr
  return workdir, result.stdout


def test_a_run_leaves_what_it_promises(finished):
  workdir, output = finished
  config = json.loads((workdir / "config.json").read_text())
  assert config["model"]["width"] == TINY["model.width"]
  rows = metrics_of(workdir)
  assert list(rows) == [1, 2, 3, 4, 5, 6]
  expected = {"loss_rec", "loss_adv", "loss_disc", "grad_norm", "lr", "lr_disc"}
  assert expected <= {k.removeprefix("train/") for k in rows[6]}
  assert list((workdir / "tensorboard").glob("events.*"))
  assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"3", "6"}
  picture = workdir / "pictures" / "step_0000006.png"
  with Image.open(picture) as image:
    assert np.asarray(image).std() > 10
  with Image.open(picture.with_suffix(".gif")) as animation:
    assert animation.n_frames == TINY["data.num_frames"]
  assert str(picture) in output
  assert "6/6" in output
  assert "ETA" in output
  assert "data wait" in output
  assert "MFU" not in output  # nobody knows a CPU's
  assert re.search(r"^compiled the step in \d", output, re.MULTILINE)
  assert re.search(r"^time 0:0\d:\d\d: step \d", output, re.MULTILINE)


@pytest.mark.slow
def test_killed_and_resumed_gives_the_same_bits(
  finished, sample_dataset, tmp_path
):
  undisturbed, _ = finished
  workdir = tmp_path / "killed"
  with subprocess.Popen(
    command(workdir, **{"data.path": sample_dataset}),
    cwd=ROOT,
    env=compile_cache.private_copy(tmp_path / "cache"),
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    # Killed once step 3 is reported: its checkpoint is missing, incomplete or
    # complete, and the run may be a step or two further.
    for line in process.stdout:
      if line.startswith("step 3/"):
        break
    process.send_signal(signal.SIGKILL)
  assert process.returncode == -signal.SIGKILL
  result = train(workdir, **{"data.path": sample_dataset})
  assert result.returncode == 0, result.stderr
  assert metrics_of(workdir) == metrics_of(undisturbed)
  got, want = arrays_of(workdir, 6), arrays_of(undisturbed, 6)
  assert got.keys() == want.keys()
  for part in ("['params']", "['ema']", "['opt_state']", "['disc_params']"):
    assert any(key.startswith(part) for key in want)
  assert any(key.startswith("['disc_opt_state']") for key in want)
  for key, value in want.items():
    assert value.tobytes() == got[key].tobytes(), key


@pytest.fixture(scope="module")
def halved(finished, sample_dataset, tmp_path_factory):
  """Resumes the same run without its last checkpoint, hence from step 3."""
  workdir = tmp_path_factory.mktemp("halved") / "run"
  subprocess.run(["cp", "-r", finished[0], workdir], check=True)
  subprocess.run(["rm", "-r", workdir / "checkpoints" / "6"], check=True)
  result = run(workdir, **{"data.path": sample_dataset})
  assert result.returncode == 0, result.stderr
  return workdir, result.stdout


def test_three_steps_and_three_more_equal_six(finished, halved):
  """Metrics after step 3 are removed when the run resumes."""
  undisturbed, _ = finished
  workdir, output = halved
  assert "resumed from step 3" in output
  assert metrics_of(workdir) == metrics_of(undisturbed)
  got, want = arrays_of(workdir, 6), arrays_of(undisturbed, 6)
  for key, value in want.items():
    assert value.tobytes() == got[key].tobytes(), key


def test_the_time_of_both_processes_adds_up(finished, halved):
  first, both = (
    [row for row in rows_of(workdir) if "goodput/total_secs" in row]
    for workdir in (finished[0], halved[0])
  )
  for row in first + both:
    parts = [v for k, v in row.items() if re.fullmatch(PART_OF_TIME, k)]
    assert len(parts) == 8
    assert math.fsum(parts) == row["goodput/total_secs"]
  first, both = first[-1], both[-1]
  born = first["time/unix_secs"] - first["goodput/total_secs"]
  np.testing.assert_allclose(
    born + both["goodput/down_secs"] + both["goodput/total_secs"],
    both["time/unix_secs"],
    atol=0.05,  # the kernel tells the time of a start in hundredths
  )
  assert first["goodput/lost_secs"] == 0 < both["goodput/lost_secs"]
  # Both processes started and compiled.
  for kind in ("start", "compile"):
    assert both[f"goodput/{kind}_secs"] > first[f"goodput/{kind}_secs"] > 0
  assert re.search(r"^time 0:0.*lost \d.*down", halved[1], re.MULTILINE)


@pytest.mark.slow
def test_other_sizes_and_augmented_clips_resume_to_the_same_bits(
  sample_dataset, tmp_path
):
  settings = {
    "data.path": sample_dataset,
    "num_steps": 4,
    "checkpoint_steps": 2,
    "data.frame_size": 48,
    "model.patch_size": 8,
    "data.clips_per_record": 2,
    "augment.flip_ratio": 0.5,
    "augment.min_crop_ratio": 0.5,
    "augment.max_crop_aspect": 1.3,
    "augment.stride_jitter": 1,
  }
  whole, halved = tmp_path / "whole", tmp_path / "halved"
  result = train(whole, **settings)
  assert result.returncode == 0, result.stderr
  assert "7 of 72 tokens are visible" in result.stdout
  shutil.copytree(whole, halved)
  shutil.rmtree(halved / "checkpoints" / "4")
  result = train(halved, **settings | {"data.num_threads": 3})
  assert "resumed from step 2" in result.stdout, result.stderr
  assert metrics_of(halved) == metrics_of(whole)
  got, want = arrays_of(halved, 4), arrays_of(whole, 4)
  for key, value in want.items():
    assert value.tobytes() == got[key].tobytes(), key
  changes = {"data.frame_size": 64, "augment.flip_ratio": 0.0}
  message = refused(train(halved, **settings | changes))
  assert all(key in message for key in changes)

  # What reads checkpoints follows.
  marlin = Marlin.from_pretrained(str(whole))
  assert marlin.architecture.tubelets == Tubelets(4, 48, 2, 8)
  windows = marlin.extract_video(shared_video("cropped04.mp4"), keep_seq=True)
  assert windows.shape[1:] == (72, TINY["model.width"])
  with Image.open(whole / "pictures" / "step_0000004.png") as image:
    assert image.width == 4 * 48 + 3 * 4


def test_a_finished_run_has_nothing_to_do(finished, sample_dataset):
  workdir, _ = finished
  result = train(workdir, **{"data.path": sample_dataset})
  assert result.returncode == 0, result.stderr
  assert "step_0000006.png" in result.stdout


def test_devices_and_parts_share_a_batch_to_the_same_losses(
  finished, sample_dataset, tmp_path
):
  want = metrics_of(finished[0])
  result = run(
    tmp_path,
    devices=2,
    **{"data.path": sample_dataset, "clips_per_device": 1, "num_steps": 6},
  )
  assert result.returncode == 0, result.stderr
  assert "2 microbatches" in result.stdout
  assert "2 x cpu" in result.stdout
  for step, row in metrics_of(tmp_path).items():
    np.testing.assert_allclose(
      row["train/loss_rec"], want[step]["train/loss_rec"], rtol=1e-4
    )


MASKS = {"mask.strategy": "tube", "mask.ratio": 0.75}


@pytest.fixture(scope="module")
def terminated(sample_dataset, tmp_path_factory):
  """Returns the workdir and the last output of a run that got SIGTERM."""
  workdir = tmp_path_factory.mktemp("terminated")
  process = subprocess.Popen(
    command(
      workdir, **{"data.path": sample_dataset, "num_steps": 100_000}, **MASKS
    ),
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.DEVNULL,
    text=True,
  )
  for line in process.stdout:
    if line.startswith("step 2/"):
      process.send_signal(signal.SIGTERM)
      break
  rest, _ = process.communicate(timeout=120)
  assert process.returncode == 128 + signal.SIGTERM
  return workdir, rest


def test_sigterm_saves_and_says_how_to_go_on(terminated):
  workdir, rest = terminated
  assert "run the same command again" in rest
  last = max(metrics_of(workdir))
  assert (workdir / "checkpoints" / str(last)).is_dir()


def test_pictures_of_a_run_are_masked_as_it_was_trained(terminated, tmp_path):
  found = run_checkpoint.masking_of(str(terminated[0]))
  assert found == tuple(MASKS.values())
  assert run_checkpoint.masking_of(str(tmp_path / "b.pt")) == ("fasking", 0.9)


# --- refusals -----------------------------------------------------------------


def test_another_configuration_cannot_resume(finished, sample_dataset):
  workdir, _ = finished
  overrides = {"data.path": sample_dataset, "model.width": 32, "seed": 1}
  message = refused(train(workdir, **overrides))
  assert "model.width: was 16, is 32" in message
  assert "seed: was 0, is 1" in message
  assert "another --workdir" in message
  assert "--config.allow_change=model.width,seed" in message


@pytest.mark.slow
def test_a_run_of_before_sampling_by_video_goes_on_by_record(
  sample_dataset, tmp_path
):
  data = {"data.path": sample_dataset}
  old = data | {"data.sample_by": "record", "data.order": "stored"}
  train(tmp_path, num_steps=4, **old)
  whole = without_step_4(tmp_path)
  # An earlier version wrote neither key to config.json.
  path = tmp_path / "config.json"
  config = json.loads(path.read_text())
  del config["data"]["sample_by"], config["data"]["order"]
  path.write_text(json.dumps(config))
  for _ in range(2):  # the second time they are there
    result = train(tmp_path, num_steps=4, **data)
    assert result.returncode == 0, result.stderr
    assert "began with data.sample_by='record' and goes on" in result.stdout
    assert "began with data.order='stored' and goes on" in result.stdout
    assert metrics_of(tmp_path) == whole
  change = "data.sample_by,data.order,num_steps"
  result = train(tmp_path, num_steps=5, allow_change=change, **data)
  assert result.returncode == 0, result.stderr
  assert "sampled by video, order hashed" in result.stdout


def test_what_an_old_run_keeps_must_fit_what_the_command_asks_for(tmp_path):
  (tmp_path / "checkpoints" / "4").mkdir(parents=True)
  config = pretrain_b.get_config().to_dict()
  del config["data"]["sample_by"], config["data"]["order"]
  (tmp_path / "config.json").write_text(json.dumps(config))
  changes = {"data.shuffle_window": 8, "data.draws_per_unit": 2}
  result = train(tmp_path, allow_change=",".join(changes), **changes)
  assert "began with data.order='stored' and goes on" in result.stdout
  message = refused(result)
  assert "shuffle_window=8: expected 0 with data.order=stored" in message
  assert "expected 1 with data.sample_by='record'" in message


@pytest.mark.slow
def test_a_run_by_subject_resumes_exactly(tmp_path):
  videos = {
    f"{i}.mp4": [
      a_record(f"{i}.mp4", 0, segment, 20, subject_id=f"{i // 2}")
      for segment in range(1 + i)
    ]
    for i in range(4)
  }
  data = made_dataset.make(tmp_path / "data", videos)
  options = {"data.path": data, "data.sample_by": "subject"}
  options["data.draws_per_unit"] = 2
  workdir = tmp_path / "run"
  result = train(workdir, num_steps=4, **options)
  assert "sampled by subject" in result.stdout
  assert "4 clips, 2 draws of each subject in a row" in result.stdout
  whole = without_step_4(workdir)
  result = train(workdir, num_steps=4, **options)
  assert "resumed from step 3" in result.stdout
  assert metrics_of(workdir) == whole
  options |= {"num_steps": 0, "num_epochs": 9}
  message = refused(train(workdir, **options))
  # An epoch has a clip of each of the two subjects.
  num_steps = math.ceil(9 * 2 / TINY["batch_size"])
  assert f"num_steps: was 4, is {num_steps}\n" in message


@pytest.mark.slow
def test_a_run_on_several_data_sets_reports_each_and_resumes_exactly(tmp_path):
  # Videos, and pictures beside them.
  for name, num_videos, num_frames in (("few", 2, 20), ("many", 5, 1)):
    videos = {
      f"{i}.mp4": [a_record(f"{i}.mp4", num_frames=num_frames)]
      for i in range(num_videos)
    }
    made_dataset.make(tmp_path / name, videos)
  options = {"data.path": f"{tmp_path}/few:1,{tmp_path}/many:3"}
  options |= {"batch_size": 8, "clips_per_device": 4}
  workdir = tmp_path / "run"
  result = train(workdir, num_steps=4, **options)
  assert result.returncode == 0, result.stderr
  assert "share of the clips: 75.00%; train/loss_rec/many" in result.stdout
  assert result.stdout.count("pictures: each is repeated to a clip of 4") == 1
  whole = without_step_4(workdir)
  chosen, _ = sampling._mixed_block((2500, 7500), 0, 0)
  for step, metrics in whole.items():
    num_many = chosen[8 * (step - 1) : 8 * step].sum()
    parts = {"few": (8 - num_many) / 8, "many": num_many / 8}
    mean = sum(
      share * metrics[f"train/loss_rec/{name}"]
      for name, share in parts.items()
      if share
    )
    np.testing.assert_allclose(mean, metrics["train/loss_rec"], rtol=1e-5)
  result = train(workdir, num_steps=4, **options)
  assert "resumed from step 3" in result.stdout
  assert metrics_of(workdir) == whole
  # Another place does not matter, another weight does.
  (tmp_path / "many").rename(tmp_path / "moved")
  options["data.path"] = f"{tmp_path}/few:1,{tmp_path}/moved:3"
  assert train(workdir, num_steps=4, **options).returncode == 0
  options["data.path"] = f"{tmp_path}/few:1,{tmp_path}/moved:2"
  assert "data.fingerprint: was" in refused(
    train(workdir, num_steps=4, **options)
  )


def test_a_run_on_cpu_tells_what_would_make_it_faster(finished):
  _, stdout = finished
  name = "MALLOC_TRIM_THRESHOLD_"
  wanted = sys.platform == "linux" and name not in os.environ
  assert (name in stdout) == wanted


def test_a_threshold_leaves_out_low_quality_and_cannot_change_silently(
  finished, tmp_path
):
  workdir, _ = finished
  videos = {f"{i}.mp4": [a_record(f"{i}.mp4", quality=i / 4)] for i in range(4)}
  data = made_dataset.make(tmp_path / "data", videos)
  overrides = {"data.path": data, "data.min_quality": 0.5, "num_epochs": 4}
  result = train(workdir, num_steps=0, **overrides)
  assert "split 'train', records: 2, videos: 2\n" in result.stdout
  assert "below data.min_quality=0.5: records: 2, videos: 2\n" in result.stdout
  assert "steps    2\n" in result.stdout
  message = refused(result)
  assert "data.min_quality: was 0.0, is 0.5" in message
  assert "allow_change=data.fingerprint,data.min_quality" in message


@pytest.mark.slow
def test_a_change_that_is_meant_goes_on_from_the_same_state(
  finished, sample_dataset, tmp_path
):
  undisturbed, _ = finished
  workdir = tmp_path / "run"
  subprocess.run(["cp", "-r", undisturbed, workdir], check=True)
  result = train(
    workdir,
    num_steps=8,
    allow_change="num_steps,adv.max_pull",
    **{"data.path": sample_dataset, "adv.max_pull": 5},
  )
  assert result.returncode == 0, result.stderr
  assert "resumed from step 6" in result.stdout
  assert list(metrics_of(workdir)) == list(range(1, 9))


@pytest.mark.parametrize(
  ("argument", "words"),
  [
    ("--config.data.pth=x", "path"),
    ("--config.nope=1", "no key 'nope'"),
    ("--config.batch_size=8.5", "batch_size"),
    ("--config.seed=99999999999999999999", "value < 2**31"),
    ("--config.mask.strategy=faces", "expected one of fasking"),
    ("--confg=x", "confg"),
  ],
)
def test_bad_flags_are_refused_before_anything_is_loaded(
  tmp_path, argument, words
):
  result = subprocess.run(
    [*command(tmp_path), argument],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
    timeout=60,
  )
  assert result.returncode == 1
  assert "Traceback" not in result.stderr
  assert words in result.stderr
  assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
  ("module", "arguments", "named"),
  [
    ("train", ["--config=configs/none.py"], "configs/none.py"),
    ("train", [], "--config"),
    ("train", ["--config=README.md"], "expected a Python file"),
    ("eval.far", ["--config=eval_far"], "--data"),
  ],
)
def test_what_a_command_lacks_is_named(module, arguments, named):
  result = subprocess.run(
    [sys.executable, "-m", f"marlin_jax.{module}", *arguments],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
    timeout=60,
  )
  message = refused(result)
  assert named in message
  assert "FATAL" not in message


def test_attention_of_another_platform_is_refused(sample_dataset, tmp_path):
  result = train(tmp_path, attention="cudnn", **{"data.path": sample_dataset})
  assert "attention='cudnn' needs a GPU" in refused(result)
  assert not (tmp_path / "checkpoints").exists()


def test_a_batch_that_does_not_divide_over_devices(sample_dataset, tmp_path):
  message = refused(run(tmp_path, devices=3, **{"data.path": sample_dataset}))
  assert "config.batch_size=4 does not divide over 3 devices" in message


def test_a_folder_without_data_set(tmp_path):
  message = refused(train(tmp_path, **{"data.path": tmp_path}))
  assert "python -m data_prep.prepare" in message


def test_a_run_starts_from_the_weights_of_another(finished, tmp_path):
  source, _ = finished
  result = train(
    tmp_path / "run",
    init_from=source,
    num_steps=1,
    **{
      "data.path": json.loads((source / "config.json").read_text())["data"][
        "path"
      ],
      "optim.base_lr": 1e-12,
      "optim.min_lr": 0,
      "optim.warmup_steps": 2,
    },
  )
  assert result.returncode == 0, result.stderr
  assert f"starts from {source}" in result.stdout
  assert "optim.warmup_steps=2: " in result.stdout
  got, want = arrays_of(tmp_path / "run", 1), arrays_of(source, 6)
  for name in want:
    if name.startswith(("['params']", "['fixed']", "['disc_params']")):
      # A run that keeps an average of the weights passes that on.
      source_name = name.replace("['params']", "['ema']")
      np.testing.assert_allclose(
        got[name], want[source_name], atol=1e-9, err_msg=name
      )
