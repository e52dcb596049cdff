"""Clips, windows and tokens."""

import numpy as np
import pytest

from marlin_jax.data.clip_geometry import Clip, Tubelets


def test_a_clip_keeps_its_stride_and_repeats_the_last_frame():
  clip = Clip(num_frames=16, stride=2)
  assert clip.span == 31
  np.testing.assert_array_equal(clip.indices(0, 31), np.arange(0, 31, 2))
  np.testing.assert_array_equal(
    clip.indices(0, 15), [*range(0, 15, 2), *[14] * 8]
  )


@pytest.mark.parametrize("total", [1, 15, 16, 31, 32, 33, 64])
def test_every_start_is_drawn_and_fits(total):
  clip = Clip(num_frames=16, stride=2)
  np_rng = np.random.default_rng(0)
  starts = {int(clip.random_starts(total, 1, np_rng)[0]) for _ in range(1000)}
  assert starts == set(range(max(total - 30, 1)))
  for start in starts:
    indices = clip.indices(start, total)
    assert indices.shape == (16,)
    assert indices.min() >= 0
    assert indices.max() < total
    if total >= 31:
      np.testing.assert_array_equal(np.diff(indices), 2)


@pytest.mark.parametrize("total", [1, 20, 31, 32, 36, 60, 64])
@pytest.mark.parametrize("num_clips", [1, 2, 3, 4])
def test_starts_of_one_record_differ_and_each_is_as_likely(total, num_clips):
  clip = Clip(num_frames=16, stride=2)
  np_rng = np.random.default_rng(0)
  num_starts = max(total - 30, 1)
  drawn = np.stack(
    [clip.random_starts(total, num_clips, np_rng) for _ in range(4000)]
  )
  assert drawn.shape == (4000, num_clips)
  for starts in drawn[:100]:
    assert len(set(starts)) == min(num_clips, num_starts)
    if num_starts >= 2 * num_clips:  # they share frames
      assert set((starts - starts[0]) % 2) == {0}
  for column in drawn.T:
    counts = np.bincount(column, minlength=num_starts)
    expected = 4000 / num_starts
    assert len(counts) == num_starts
    assert (abs(counts - expected) < 5 * np.sqrt(expected) + 1).all()


def test_starts_go_on_from_the_first_and_around():
  clip = Clip(num_frames=16, stride=2)
  assert clip.spread_starts(5, 10, 3).tolist() == [5, 7, 1]
  assert clip.spread_starts(4, 10, 5).tolist() == [4, 6, 8, 0, 2]
  # Too few starts that are two frames apart, then too few starts.
  assert clip.spread_starts(5, 7, 4).tolist() == [5, 6, 1, 3]
  assert clip.spread_starts(2, 3, 4).tolist() == [2, 2, 0, 1]


@pytest.mark.parametrize("hop", [1, 7, 16, 31, 32, None])
def test_windows_cover_every_frame_and_pad_only_what_is_too_short(hop):
  clip = Clip(num_frames=16, stride=2)
  for total in range(1, 101):
    starts = clip.window_starts(total, hop)
    ends = starts + clip.extent
    seen = {i for s, e in zip(starts, ends, strict=True) for i in range(s, e)}
    assert seen >= set(range(total))
    assert starts[0] == 0
    assert np.all(np.diff(starts) > 0)
    for start in starts:
      indices = clip.indices(start, total)
      if total >= clip.span:
        np.testing.assert_array_equal(np.diff(indices), clip.stride)
    if total >= clip.extent:
      assert ends[-1] == total
      # Only the last window is off the grid of hops.
      assert np.all(starts[:-1] % (hop or clip.extent) == 0)


@pytest.mark.parametrize(
  ("total", "expected"),
  [
    (1, [0]),
    (31, [0]),
    (32, [0]),
    (33, [0, 1]),
    (64, [0, 32]),
    (300, [*range(0, 257, 32), 268]),
  ],
)
def test_the_last_window_is_moved_back_to_end_with_the_video(total, expected):
  assert Clip(16, 2).window_starts(total).tolist() == expected


@pytest.mark.parametrize("hop", [0, -32, 33])
def test_windows_with_gaps_between_them_are_refused(hop):
  with pytest.raises(
    ValueError, match="do not cover a video; expected 1 to 32"
  ):
    Clip(16, 2).window_starts(100, hop)


def test_tokens_are_ordered_t_h_w_and_pixels_c_pt_ph_pw():
  tubelets = Tubelets()
  assert tubelets.grid == (8, 14, 14)
  assert (tubelets.num_tokens, tubelets.pixels) == (1568, 1536)
  video = np.random.default_rng(0).integers(0, 255, (2, 16, 224, 224, 3))
  tokens = tubelets.patchify(video)
  t, h, w, c, pt, ph, pw = 5, 3, 11, 2, 1, 7, 13
  pixel = ((c * 2 + pt) * 16 + ph) * 16 + pw
  assert (
    tokens[1, (t * 14 + h) * 14 + w, pixel]
    == video[1, 2 * t + pt, 16 * h + ph, 16 * w + pw, c]
  )


def test_unpatchify_is_the_inverse_of_patchify():
  tubelets = Tubelets(num_frames=4, image_size=32)
  video = np.random.default_rng(0).normal(size=(3, 4, 32, 32, 3))
  np.testing.assert_array_equal(
    tubelets.unpatchify(tubelets.patchify(video)), video
  )
