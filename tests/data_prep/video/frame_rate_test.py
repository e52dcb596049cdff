"""Frames resampled to one rate: none mixed, none late, times consistent."""

import numpy as np
import pytest

from data_prep.video.decode import DecodeError
from data_prep.video.frame_rate import resampled


def shown(
  times: list[float], rate: float, fill_pauses: bool = False
) -> list[tuple[int, float]]:
  """Returns the numbers of the resampled frames and their times."""
  frames = [(np.full(1, i), secs) for i, secs in enumerate(times)]
  return [
    (int(frame[0]), secs)
    for frame, secs in resampled(frames, rate, fill_pauses)
  ]


@pytest.mark.parametrize("digits", [3, 9])
def test_frames_at_that_rate_pass_as_they_are(digits):
  times = [round(1.5 + i / 25, digits) for i in range(200)]
  result = shown(times, 25.0)
  assert [i for i, _ in result] == list(range(200))
  np.testing.assert_allclose([s for _, s in result], times, atol=1e-3)


def test_thirty_to_twenty_five_leaves_out_every_sixth():
  result = shown([i / 30 for i in range(60)], 25.0)
  numbers = [i for i, _ in result]
  assert len(numbers) == 50
  assert len(set(numbers)) == 50
  for i, secs in result:
    # The frame shown at that time: it has begun, and the next has not.
    assert i / 30 - 0.01 <= secs < (i + 1) / 30


def test_fifteen_to_twenty_five_repeats_and_keeps_the_duration():
  result = shown([i / 15 for i in range(30)], 25.0)
  assert len(result) == 50
  assert {i for i, _ in result} == set(range(30))
  assert np.diff([s for _, s in result]) == pytest.approx(1 / 25)


def test_a_variable_rate_keeps_its_pictures_on_time():
  times = [0, 0.04, 0.08, 0.5, 0.51, 0.52, 1.0]
  for i, secs in shown(times, 25.0):
    assert times[i] - 0.01 <= secs
    assert i + 1 == len(times) or secs < times[i + 1]


def test_a_pause_is_filled_for_two_seconds_and_then_skipped():
  result = shown([0.0, 0.04, 10.02, 10.06], 25.0)
  assert [i for i, _ in result] == [0, *[1] * 50, 2, 3]
  secs = [secs for _, secs in result]
  assert np.diff(secs[:51]) == pytest.approx(1 / 25)
  # The clock stays that of the beginning: sound and frames keep together.
  assert secs[51:] == pytest.approx([10.04, 10.08])


def test_leaps_cost_no_more_frames_than_two_seconds_each():
  result = shown([i * 59.0 for i in range(40)], 25.0)
  assert len(result) <= 40 * 51
  assert {i for i, _ in result} == set(range(40))


def test_a_pause_is_filled_to_its_end_on_demand():
  assert len(shown([0.0, 10.0], 25.0, fill_pauses=True)) == 500
  with pytest.raises(DecodeError, match=r"a pause of 9000 s .* at 0\.0 s"):
    shown([0.0, 9000.0], 25.0, fill_pauses=True)


def test_one_frame_is_one_frame_and_none_is_none():
  assert shown([7.0], 25.0) == [(0, 7.0)]
  assert shown([], 25.0) == []
