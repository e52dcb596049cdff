"""Encoding of many videos, without reading any."""

from pathlib import Path

import numpy as np

from marlin_jax.inference import video_folder
from marlin_jax.inference.face_windows import Window, WindowSettings


def test_a_video_whose_features_are_not_finite_is_refused_and_tried_again(
  monkeypatch,
):
  def events(paths, settings, num_workers):
    box = np.zeros(4, np.float32)
    for number, values in enumerate(((1, 2), (3, np.nan), (4, 5))):
      for value in values:
        frames = np.full((2, 4, 4, 3), value, np.float32)
        yield number, Window(frames, 0, 2, 0.0, 0.1, box)
      yield number, video_folder.Outcome("", f"hash {number}", 1)

  monkeypatch.setattr(video_folder, "_read_many", events)
  videos = [video_folder.Video(f"{i}.mp4", Path(f"{i}"), 1) for i in range(3)]
  found = video_folder.encode_many(
    lambda clips: clips.mean(axis=(1, 2, 3)),
    videos,
    WindowSettings(),
    batch_size=2,
    num_workers=1,
  )
  outcomes = [encoded.outcome for encoded in found]
  assert ["not finite" in outcome.reason for outcome in outcomes] == [
    *(False, True, False),
  ]
  # Without a hash it is not held to be done.
  assert [outcome.sha256 for outcome in outcomes] == ["hash 0", "", "hash 2"]
