"""Features of sound, and of video and sound together."""

import json

import numpy as np
import pytest

from marlin_jax import convert, features
from marlin_jax.data.clip_geometry import Clip, SoundPatches
from marlin_jax.downstream import feature_table
from marlin_jax.inference.face_windows import WindowSettings, read_windows
from marlin_jax.inference.marlin import Marlin
from marlin_jax.weights import formats, run_checkpoint
from marlin_jax.weights.weights import WeightsError
from tests.support import talking_mouths
from tests.support.files import read_lines
from tests.support.training_runs import metrics_of, train

pytestmark = pytest.mark.slow

SOUND = {
  "adv.weight": 0.0,
  "sound.weight": 1.0,
  "sound.width": 24,
  "sound.depth": 1,
  "sound.num_heads": 2,
  "sound.dec_width": 16,
  "sound.dec_depth": 1,
  "sound.dec_num_heads": 2,
  "data.frame_size": 32,
  "data.num_frames": 8,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Returns the workdir of a run."""
  root = tmp_path_factory.mktemp("run")
  data = talking_mouths.write_dataset(root / "data", 4, 1, 30)
  result = train(root / "run", **SOUND, **{"data.path": data, "num_steps": 3})
  assert result.returncode == 0, result
  assert "mel rows are visible" in result.stdout
  row = metrics_of(root / "run")[3]
  assert row["train/sound/share"] == 1
  assert {"train/loss_sound", "train/sound/accuracy"} <= set(row)
  return root / "run"


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
  """Returns a folder of two videos with sound, and one without."""
  folder = tmp_path_factory.mktemp("videos")
  for i in range(3):
    talk = talking_mouths.talk(i, 40, size=64)
    sound = talk.sound if i < 2 else None
    talking_mouths.write_mp4(folder / f"{i}.mp4", talk.frames, sound)
  return folder


def extract(videos, run, output, modality, *flags) -> int:
  argv = [str(videos), f"--checkpoint={run}", f"--output={output}"]
  return features.main([*argv, f"--modality={modality}", *flags])


def test_sound_and_both_are_rows_as_those_of_video(run, videos, tmp_path):
  found = {}
  for modality in ("video", "sound", "both"):
    folder = tmp_path / modality
    assert extract(videos, run, folder, modality, "--num_workers=1") == 0
    found[modality] = feature_table.read(str(folder), "mean").rows
    settings = json.loads((folder / "settings.json").read_text())
    assert settings.get("modality", "video") == modality
    refused = read_lines(folder / "quarantine.jsonl")
    if modality == "video":
      assert not refused
    else:
      assert "no sound track" in refused[0]["reason"]
  assert list(found["video"]) == ["0.mp4", "1.mp4", "2.mp4"]
  for name in ("0.mp4", "1.mp4"):
    video, sound = found["video"][name], found["sound"][name]
    assert (video.shape, sound.shape) == ((16,), (24,))
    np.testing.assert_allclose(
      found["both"][name], np.concatenate([video, sound]), atol=1e-5
    )
  assert not np.allclose(found["sound"]["0.mp4"], found["sound"]["1.mp4"])


def test_features_of_sound_are_the_norm_of_the_mean_token(
  run, videos, tmp_path
):
  weights = run_checkpoint.read_sound(run)
  clip = Clip(8, 2)
  assert weights.patches == SoundPatches.of(clip)
  encoder = weights.encoder()
  settings = WindowSettings(clip=clip, image_size=32, sound=weights.patches)
  path = videos / "0.mp4"
  windows = list(read_windows(path, settings))
  tokens = weights.patches.patchify(np.stack([w.mel for w in windows]))
  want = encoder.norm(encoder.tokens(tokens).mean(1))
  folder = tmp_path / "sound"
  extract(path, run, folder, "sound", "--num_workers=1")
  with np.load(folder / "0.mp4.npz") as file:
    np.testing.assert_allclose(file["features"], want, atol=1e-5)
  marlin = Marlin.from_pretrained(str(run))
  for modality, expected in (
    ("sound", want),
    ("both", np.concatenate([marlin.extract_video(path), want], axis=1)),
  ):
    found = marlin.extract_video(path, modality=modality)
    np.testing.assert_allclose(found, expected, atol=1e-5)
  # A run keeps an average of its weights, which this is.
  state = run_checkpoint.read_state(
    run_checkpoint.read_meta(run)[0],
    lambda tree: {"ema": tree["ema"]},
  )
  kept = state["ema"]["objectives"]["sound"]["encoder"]
  np.testing.assert_array_equal(
    weights.arrays["patch_embedding.kernel"], kept["patch_embedding"]["kernel"]
  )


def test_what_has_no_encoder_of_sound_is_refused(run, videos, tmp_path, capsys):
  folder = tmp_path / "features"
  without, exported = tmp_path / "without", tmp_path / "exported"
  run_checkpoint.write(formats.read(run), without)
  marlin = Marlin.from_pretrained(str(without))
  for options, error in (
    ({"modality": "sound"}, WeightsError),
    ({"modality": "smell"}, ValueError),
    ({"modality": "both", "keep_seq": True}, ValueError),
  ):
    with pytest.raises(error, match="sound"):
      marlin.extract_video(videos / "0.mp4", **options)
  assert extract(videos, without, folder, "sound") == 1
  assert "config.sound.weight" in capsys.readouterr().err
  argv = ["--to=safetensors", str(run), str(exported)]
  assert convert.main([*argv, f"--clip={videos / '0.mp4'}"]) == 0
  assert "encoder of sound is not written" in capsys.readouterr().out
  assert extract(videos, exported, folder, "both") == 1
  assert "no workdir of a run" in capsys.readouterr().err
  assert extract(videos, run, folder, "both", "--keep_seq") == 1
  assert "--keep_seq" in capsys.readouterr().err
