"""The sound of windows of video files."""

import numpy as np
import pytest

from marlin_jax.data.clip_geometry import Clip, SoundPatches
from marlin_jax.inference.face_windows import (
  FaceVideoError,
  WindowSettings,
  read_windows,
)
from tests.support import talking_mouths
from tests.support.videos import moving_noise

NUM_FRAMES, CLICK_FRAME = 70, 45


def settings(stride: int, rule: str = "cover") -> WindowSettings:
  clip = Clip(8, stride)
  return WindowSettings(
    clip=clip, image_size=32, sound=SoundPatches.of(clip), window_rule=rule
  )


def clicking(path, fps: int, num_frames=NUM_FRAMES):
  """Writes a video with a click as CLICK_FRAME begins."""
  sound = np.zeros(int(num_frames / fps * 16_000), np.int16)
  sound[round(CLICK_FRAME / fps * 16_000) :][:1] = 20_000
  frames = moving_noise(num_frames)
  return talking_mouths.write_mp4(path, frames, sound, fps=fps)


@pytest.mark.parametrize(("stride", "fps"), [(1, 25), (2, 30), (4, 25)])
def test_a_click_is_heard_in_the_windows_that_show_its_frame(
  tmp_path, stride, fps
):
  path = clicking(tmp_path / "v.mp4", fps)
  wanted = settings(stride)
  num_heard = 0
  for window in read_windows(path, wanted):
    assert window.mel.shape == (wanted.sound.num_rows, 80)
    energy = (window.mel + 4).sum(-1)
    place = (CLICK_FRAME - window.first_frame) / wanted.clip.extent
    is_inside = 0.1 < place < 0.9
    assert not is_inside or energy.max() > 10
    if is_inside:
      num_heard += 1
      row = np.average(np.arange(len(energy)), weights=energy)
      assert abs(row / len(energy) - place) < 0.06
    elif not -0.3 < place < 1.3:
      assert energy.max() < 1
  assert num_heard


def test_a_short_video_and_one_frame_have_the_sound_of_their_time(tmp_path):
  for num_frames in (1, 5):
    path = tmp_path / f"{num_frames}.mp4"
    sound = np.full(int(num_frames / 25 * 16_000), 100, np.int16)
    talking_mouths.write_mp4(path, moving_noise(num_frames), sound)
    (window,) = read_windows(path, settings(2))
    assert window.mel.shape == (48, 80)
    # The last row is repeated, as the last frame is.
    first_held = int(num_frames / 16 * 48) + 2
    assert np.ptp(window.mel[first_held:], axis=0).max() == 0


def test_a_video_without_sound_is_refused(tmp_path):
  path = talking_mouths.write_mp4(tmp_path / "v.mp4", moving_noise(9), None)
  with pytest.raises(FaceVideoError, match="no sound track"):
    list(read_windows(path, settings(1)))
  (window, *_) = read_windows(path, WindowSettings(image_size=32))
  assert window.mel is None
