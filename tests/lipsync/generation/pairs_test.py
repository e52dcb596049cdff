"""Generation from pair lists."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from data_prep.video import decode
from marlin_jax.lipsync.generation import pairs
from marlin_jax.lipsync.generation.drawing import FaceDrawer
from marlin_jax.lipsync.generation.generate import GenerationError
from marlin_jax.records.folders import OutputFolderError
from tests.support.sounds import clicks, write_sound
from tests.support.videos import write_video


class Grey(nnx.Module):
  """Draws grey faces; `level` is its only weight."""

  num_frames, image_size, mixes_frames = 5, 32, False

  def __init__(self, level: float = 0.5):
    self.level = nnx.Param(jnp.float32(level))

  def __call__(self, masked, reference, mels):
    return jnp.broadcast_to(self.level[...], reference.shape)


@pytest.fixture(scope="module")
def root(carphone_frames, tmp_path_factory) -> Path:
  """A folder as of LRS2: a man's video of 1.2 s, and sounds."""
  root = tmp_path_factory.mktemp("root")
  (root / "a").mkdir()
  frames = list(carphone_frames[:30])
  write_video(root / "a" / "00001.mp4", frames, rate=25)
  # 1 s, and longer than the video.
  write_sound(root / "a" / "00002.mp4", clicks(8000)[:8000], 8000)
  write_sound(root / "a" / "00003.mp4", clicks(8000), 8000)
  return root


def write_list(path: Path, *lines: str) -> Path:
  path.write_text("".join(f"{line}\n" for line in lines))
  return path


def num_frames(path: Path) -> int:
  with decode.open_video(path) as video:
    return sum(1 for _ in video)


def test_list_gives_a_video_per_line_and_is_resumed(
  root, face_models, tmp_path, capsys
):
  listed = write_list(
    tmp_path / "lrs2.txt", "a/00002 a/00001", "a/00003 a/00001"
  )
  output = tmp_path / "out"
  pairs.run(FaceDrawer(Grey()), listed, root, output)
  # As published: frames whose 16 mel rows are within the 81 rows of 1 s.
  assert num_frames(output / "0.mp4") == len(
    [i for i in range(30) if int(i * 80 / 25) + 16 <= 81]
  )
  assert not (output / "1.mp4").exists()
  text = capsys.readouterr().out
  assert "1 video" in text
  assert "left out: 1 pair" in text
  assert "it has 30 frames" in text
  state = json.loads((output / "pairs.json").read_text())
  assert state["done"] == ["0.mp4"]
  assert list(state["left_out"]) == ["1.mp4"]

  before = (output / "0.mp4").stat().st_mtime_ns
  pairs.run(FaceDrawer(Grey()), listed, root, output)
  assert (output / "0.mp4").stat().st_mtime_ns == before
  # A video that was removed is made again.
  (output / "0.mp4").unlink()
  pairs.run(FaceDrawer(Grey()), listed, root, output)
  assert num_frames(output / "0.mp4") > 0

  for drawer, path in (
    (FaceDrawer(Grey(0.4)), listed),
    (FaceDrawer(Grey()), write_list(tmp_path / "b.txt", "a/00002 a/00001")),
  ):
    with pytest.raises(OutputFolderError, match="another"):
      pairs.run(drawer, path, root, output)


def test_every_bad_line_is_told_before_anything_is_drawn(root, tmp_path):
  listed = write_list(
    tmp_path / "l.txt", "a/00002 a/00001", "a/00002", "a/1 a/00001"
  )
  with pytest.raises(GenerationError) as caught:
    pairs.read_pairs(listed, root)
  lines = str(caught.value).splitlines()
  assert "2 problems" in lines[0]
  assert "line 2: expected two paths" in lines[1]
  assert f"line 3: there is no {root}/a/1.mp4" in lines[2]
  with pytest.raises(GenerationError, match="no lines"):
    pairs.read_pairs(write_list(tmp_path / "empty.txt"), root)
  with pytest.raises(GenerationError, match="cannot read"):
    pairs.read_pairs(tmp_path / "none.txt", root)


def test_folder_with_other_videos_is_refused(root, tmp_path):
  listed = write_list(tmp_path / "l.txt", "a/00002 a/00001")
  (tmp_path / "mine.mp4").write_bytes(b"mine")
  with pytest.raises(OutputFolderError, match="choose another"):
    pairs.run(FaceDrawer(Grey()), listed, root, tmp_path)


def test_paths_with_a_suffix_are_taken_as_they_are(root, tmp_path):
  listed = write_list(tmp_path / "l.txt", "a/00002.mp4 a/00001")
  (pair,) = pairs.read_pairs(listed, root)
  assert pair == (root / "a/00002.mp4", root / "a/00001.mp4")
  assert np.all([path.exists() for path in pair])
