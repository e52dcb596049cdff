"""Stills, animations and heat maps."""

import av
import numpy as np
import pytest
from PIL import Image

from marlin_jax.inference import pictures

GRID = (2, 2, 2)


def make_views(norm_pix=False):
  video = np.random.default_rng(0).integers(0, 256, (2, 4, 32, 32, 3), np.uint8)
  visible = np.zeros((2, 8), bool)
  visible[0, [0, 7]] = True
  made = np.full(video.shape, 2.0)  # brighter than white
  return video, pictures.panels(video, visible, made, GRID, norm_pix=norm_pix)


def smooth_views(num_frames, height, width, num_views=2):
  """Returns smooth gradients, which codecs preserve."""
  t, y, x = np.meshgrid(
    *(np.linspace(0, 1, n) for n in (num_frames, height, width)), indexing="ij"
  )
  video = (np.stack([t, y, x], axis=-1) * 200 + 20).round().astype(np.uint8)
  names = tuple("abc"[:num_views])
  return pictures.Views(names, np.stack([video[None]] * num_views))


def test_only_visible_tokens_show_in_the_middle_panel():
  video, views = make_views()
  original, seen, made = views.frames
  np.testing.assert_array_equal(original, video)
  np.testing.assert_array_equal(seen[0, :2, :16, :16], video[0, :2, :16, :16])
  np.testing.assert_array_equal(seen[0, 2:, 16:, 16:], video[0, 2:, 16:, 16:])
  hidden = seen[0, 2:, :16, :16]
  assert (hidden == hidden.flat[0]).all()
  assert (seen[1] == hidden.flat[0]).all()
  assert (made == 255).all()


def test_the_caption_mentions_true_statistics_of_normalised_predictions():
  _, plain = make_views()
  _, normalised = make_views(norm_pix=True)
  assert plain.names[2] == "reconstruction"
  assert normalised.names[2] == "reconstruction (true mean, std)"


def test_the_still_shows_every_view_of_every_clip():
  video, views = make_views()
  picture = pictures.picture(views, num_frames=2)
  assert picture.dtype == np.uint8
  assert picture.shape[1] == 2 * 32 + 4
  for clip in range(2):
    for frame in video[clip, [0, 3]]:
      assert any(
        (picture[y : y + 32, x : x + 32] == frame).all()
        for x in (0, 36)
        for y in range(picture.shape[0] - 31)
      )


def test_the_animation_has_an_image_per_frame(tmp_path):
  _, views = make_views()
  path = tmp_path / "clip.gif"
  pictures.save_animation(views, path, fps=10)
  with Image.open(path) as animation:
    assert animation.n_frames == 4
    assert animation.info["duration"] == 100
    assert animation.info["loop"] == 0


@pytest.mark.parametrize("fps", [1.0, 12.5, 15.0, 30.0, 50.0, 60.0, 119.88])
def test_a_gif_lasts_as_long_as_the_video(tmp_path, fps):
  frames = [np.full((8, 8, 3), 2 * i, np.uint8) for i in range(120)]
  path = tmp_path / "clip.gif"
  pictures.save_frames(frames, path, fps=fps)
  with Image.open(path) as animation:
    durations = []
    for i in range(animation.n_frames):
      animation.seek(i)
      durations.append(animation.info["duration"])
  assert sum(durations) == pytest.approx(120_000 / fps, abs=5)
  assert min(durations) >= 20


@pytest.mark.parametrize("size", [(48, 64), (47, 63)], ids=["even", "odd"])
def test_an_mp4_plays_everywhere_and_shows_the_frames(tmp_path, size):
  views = smooth_views(5, *size)
  path = tmp_path / "clip.mp4"
  pictures.save_animation(views, path, fps=12.5)
  with av.open(str(path)) as container:
    (stream,) = container.streams
    frames = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
    codec = stream.codec_context
    assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
    assert stream.average_rate == 12.5
  assert len(frames) == 5
  for frame, expected in zip(frames, views.frames[0, 0], strict=True):
    assert frame.shape[0] % 2 == frame.shape[1] % 2 == 0
    shown = frame[22 : 22 + size[0], : size[1]]  # below the caption
    difference = np.abs(shown.astype(int) - expected)[1:-1, 1:-1]
    assert difference.mean() < 3
  # The index comes first, so that playback starts while loading.
  data = path.read_bytes()
  assert data.index(b"moov") < data.index(b"mdat")


def test_joined_clips_show_no_frame_twice():
  # The last clip is moved back to end with the video, at odd frames.
  numbers = np.array([[0, 2, 4, 6], [3, 5, 7, 9]])
  frames = np.arange(8, dtype=np.uint8).reshape(1, 2, 4, 1, 1, 1)
  views = pictures.Views(("a",), np.broadcast_to(frames, (1, 2, 4, 1, 1, 3)))
  joined = pictures.join_clips(views, numbers)
  assert joined.frames.shape == (1, 1, 6, 1, 1, 3)
  assert joined.frames[0, 0, :, 0, 0, 0].tolist() == [0, 1, 2, 3, 6, 7]
  # A video of three frames repeats its last one.
  short = views._replace(frames=views.frames[:, :1])
  joined = pictures.join_clips(short, np.array([[0, 2, 2, 2]]))
  assert joined.frames[0, 0, :, 0, 0, 0].tolist() == [0, 1]


def test_heat_is_at_high_values_and_the_original_is_unchanged():
  video = np.full((1, 4, 32, 32, 3), 100, np.uint8)
  weights = np.full((1, 8), 1.0)
  weights[0, 7] = 9.0  # second half of the frames, lower right
  views = pictures.heat_map(video, weights, GRID, "rollout")
  original, heat = views.frames[:, 0].astype(int)
  assert (original == 100).all()
  np.testing.assert_array_equal(heat[0], heat[1])
  np.testing.assert_array_equal(heat[0, :, :, 0], heat[0, 0, 0, 0])
  bright = heat[2, ..., 0]
  assert bright[-4:, -4:].min() > 150
  assert bright[:4, :].max() < 100
  # The mean is 2: values are 0.5 and 4.5 times the mean, clipped by percentile.
  assert views.names == ("original", "rollout: 0.50-4.22 x mean")


def test_uniform_heat_does_not_divide_by_zero():
  video = np.zeros((1, 4, 32, 32, 3), np.uint8)
  views = pictures.heat_map(video, np.ones((1, 8)), GRID, "rollout")
  assert views.names[1] == "rollout: 1.00-1 x mean"
