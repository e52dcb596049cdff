"""Pairs of real people: no track shows two, whatever the light."""

import csv
import itertools
from pathlib import Path

import cv2
import numpy as np
import pytest

from data_prep.faces import boxes, tracking
from tests.support import scenes
from tests.support.videos import VIDEOS, shared_video

FOOTAGE = VIDEOS.parent / "footage"
NUM_FRAMES = 90
DISSOLVES = (12, 20, 30, 45)
GAINS = (1.0, 0.7, 0.5, 0.35, 0.2)
NUM_FOOTAGE_PEOPLE = 6


def paths() -> list[Path]:
  """Returns a video of each of eight people."""
  found = [shared_video("video01.mp4"), shared_video("video03.mp4")]
  if not (FOOTAGE / "index.csv").is_file():
    pytest.skip("../shared/footage is not there")
  people = {}
  with (FOOTAGE / "index.csv").open() as file:
    for row in csv.DictReader(file):
      if row["kind"] == "real" and row["alone"] == "yes":
        people.setdefault(row["subject_id"], row)
  long = [FOOTAGE / r["path"] for r in people.values() if int(r["frames"]) > 90]
  return (
    found
    + long[:: max(len(long) // NUM_FOOTAGE_PEOPLE, 1)][:NUM_FOOTAGE_PEOPLE]
  )


def letterboxed(frame: np.ndarray) -> np.ndarray:
  """Returns the frame within 480x360."""
  factor = min(360 / frame.shape[0], 480 / frame.shape[1])
  picture = scenes.scaled(frame, factor)[:360, :480]
  out = np.zeros((360, 480, 3), np.uint8)
  scenes.paste(
    out,
    picture,
    (480 - picture.shape[1]) // 2,
    (360 - picture.shape[0]) // 2,
  )
  return out


@pytest.fixture(scope="module")
def people(finder) -> dict[str, list[list[np.ndarray]]]:
  """Frames of each person: whole, and the face at one place of a grey wall."""
  whole, faces = [], []
  for path in paths():
    frames = [letterboxed(f) for f in scenes.read(path, NUM_FRAMES)]
    box = boxes.square_around(finder.detect(frames[0])[0].box, 1.7)
    walls = [np.full_like(frame, 110) for frame in frames]
    for wall, frame in zip(walls, frames, strict=True):
      wall[60:284, 128:352] = boxes.crop_frame(frame, box)
    whole.append(frames)
    faces.append(walls)
  return {"whole frame": whole, "face alone": faces}


def spans(frames, finder) -> list[tuple[int, int]]:
  tracks = tracking.find_tracks(frames, finder)
  return [(t.first_frame, t.first_frame + len(t)) for t in tracks]


@pytest.mark.slow
@pytest.mark.parametrize("gain", GAINS)
@pytest.mark.parametrize("kind", ["whole frame", "face alone"])
def test_cut_between_any_two_people_ends_the_track_to_the_frame(
  kind, gain, people, finder
):
  for one, other in itertools.combinations(people[kind], 2):
    frames = [(gain * f).astype(np.uint8) for f in one[:25] + other[:25]]
    found = spans(frames, finder)
    assert all(stop <= 25 or start >= 25 for start, stop in found)
    assert sum(stop - start for start, stop in found) >= 40


@pytest.mark.slow
@pytest.mark.parametrize("length", DISSOLVES)
@pytest.mark.parametrize("kind", ["whole frame", "face alone"])
def test_dissolve_between_any_two_people_ends_the_track(
  kind, length, people, finder
):
  for one, other in itertools.combinations(people[kind], 2):
    frames = []
    for i in range(40 + length):
      share = min(max((i - 20) / length, 0), 1)
      frames.append(cv2.addWeighted(one[i], 1 - share, other[i], share, 0))
    for start, stop in spans(frames, finder):
      # None that begins with the one holds a frame of the other alone.
      assert start >= 15 or stop <= 20 + length


def test_a_person_who_turns_and_comes_back_is_one_track(finder):
  path = FOOTAGE / "clip_046.mp4"
  if not path.is_file():
    pytest.skip("../shared/footage is not there")
  assert len(spans(scenes.read(path, 162), finder)) == 1


LIGHTS = {
  "exposure ramp": lambda i: 0.6 + 0.4 * np.clip((i - 24) / 12, 0, 1),
  "brighter": lambda i: 0.75 + 0.5 * np.clip((i - 24) / 10, 0, 1),
  "flash": lambda i: 1.8 if i in (25, 26) else 1.0,
  "cloud": lambda i: 1 - 0.4 * np.exp(-(((i - 30) / 6) ** 2)),
  "lamp switched off": lambda i: 1.0 if i < 30 else 0.15,
}


@pytest.mark.parametrize("light", LIGHTS)
def test_change_of_light_does_not_part_a_person(light, finder):
  for name in ("video01.mp4", "video03.mp4"):
    frames = scenes.read(shared_video(name), 60)
    lit = [
      np.clip(LIGHTS[light](i) * frame.astype(np.float32), 0, 255)
      for i, frame in enumerate(frames)
    ]
    assert spans([f.astype(np.uint8) for f in lit], finder) == [(0, 60)]
