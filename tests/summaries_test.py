"""Pictures."""

import numpy as np
from PIL import Image

from marlin_jax import summaries

GRID = (2, 2, 2)


def make_views():
  video = np.random.default_rng(0).integers(0, 256, (2, 4, 32, 32, 3), np.uint8)
  visible = np.zeros((2, 8), bool)
  visible[0, [0, 7]] = True
  made = np.full(video.shape, 2.0)  # brighter than white
  return video, summaries.panels(video, visible, made, GRID)


def test_only_visible_tokens_show_in_the_middle_panel():
  video, (original, seen, made) = make_views()
  np.testing.assert_array_equal(original, video)
  np.testing.assert_array_equal(seen[0, :2, :16, :16], video[0, :2, :16, :16])
  np.testing.assert_array_equal(seen[0, 2:, 16:, 16:], video[0, 2:, 16:, 16:])
  hidden = seen[0, 2:, :16, :16]
  assert (hidden == hidden.flat[0]).all()
  assert (seen[1] == hidden.flat[0]).all()
  assert (made == 255).all()


def test_the_picture_holds_every_panel_of_every_clip():
  video, views = make_views()
  picture = summaries.picture(views, num_frames=2)
  assert picture.dtype == np.uint8
  assert picture.shape[1] == 2 * 32 + 4
  for clip in range(2):
    for frame in video[clip, [0, 3]]:
      assert any(
        (picture[y : y + 32, x : x + 32] == frame).all()
        for x in (0, 36)
        for y in range(picture.shape[0] - 31)
      )


def test_the_animation_has_a_picture_per_frame(tmp_path):
  _, views = make_views()
  path = tmp_path / "clip.gif"
  summaries.save_animation(views, path, fps=10)
  with Image.open(path) as animation:
    assert animation.n_frames == 4
    assert animation.info["duration"] == 100
    assert animation.info["loop"] == 0
