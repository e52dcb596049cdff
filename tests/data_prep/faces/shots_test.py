"""One person is told from another, and a cut from a change of light."""

import itertools

import cv2
import numpy as np
import pytest

from data_prep.faces import shots

GAINS = (1.0, 0.7, 0.5, 0.35, 0.2)


def picture(seed: int, height: int = 180, width: int = 240) -> np.ndarray:
  """Returns float32 (H, W, 3) in [20, 230] with detail of many sizes."""
  rng = np.random.default_rng(seed)
  whole = np.zeros((height, width, 3), np.float32)
  for cell in (4, 12, 40):
    noise = rng.normal(size=(height // cell + 2, width // cell + 2, 3))
    whole += cv2.resize(
      noise.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC
    )
  whole -= whole.min()
  return 20 + 210 * whole / whole.max()


def lit(frame: np.ndarray, gain: float, offset: float = 0.0) -> np.ndarray:
  return np.clip(gain * frame + offset, 0, 255).astype(np.uint8)


def mesh(x: float = 120, y: float = 90, height: float = 90) -> np.ndarray:
  """Returns points (478, 2) all over an ellipse."""
  rng = np.random.default_rng(0)
  radius, angle = np.sqrt(rng.random(478)), 2 * np.pi * rng.random(478)
  unit = np.stack([0.4 * np.cos(angle), 0.5 * np.sin(angle)], axis=1)
  return np.float32([x, y] + height * radius[:, None] * unit)


# --- Cuts ---------------------------------------------------------------------


def cuts(frames) -> list[int]:
  is_cut = shots.CutTest()
  return [i for i, frame in enumerate(frames) if is_cut(frame)]


@pytest.mark.parametrize("gain", GAINS)
def test_cut_is_seen_at_any_brightness(gain):
  frames = [picture(0)] * 10 + [picture(1)] * 10 + [picture(2)] * 10
  assert cuts(lit(frame, gain) for frame in frames) == [10, 20]


LIGHTS = {
  "exposure ramp": lambda i: 0.6 + 0.4 * np.clip((i - 10) / 12, 0, 1),
  "brighter and overexposed": lambda i: 0.75
  + 0.5 * np.clip(i - 10, 0, 10) / 10,
  "flash": lambda i: 1.8 if i in (15, 16) else 1.0,
  "blinding flash": lambda i: 20.0 if i in (15, 16) else 1.0,
  "cloud": lambda i: 1 - 0.4 * np.exp(-(((i - 15) / 6) ** 2)),
  "lamp switched off": lambda i: 1.0 if i < 15 else 0.15,
  "flicker": lambda i: 1.0 if i % 2 else 0.7,
}


@pytest.mark.parametrize("light", LIGHTS)
def test_change_of_light_is_no_cut(light):
  frames = (lit(picture(0), LIGHTS[light](i)) for i in range(40))
  assert cuts(frames) == []


# --- Looks --------------------------------------------------------------------


@pytest.mark.parametrize(
  ("before", "after"), list(itertools.product(GAINS, GAINS))
)
def test_look_is_of_one_person_at_any_two_gains_and_of_no_other(before, after):
  frame = lit(picture(0), before)
  look = shots.Look(frame, mesh())
  for offset in (0, 15):
    same = lit(picture(0), after, offset)
    assert not look.is_other_face(same, shots.Look(same, mesh()))
  for seed in range(1, 8):
    other = lit(picture(seed), after)
    assert look.is_other_face(other, shots.Look(other, mesh()))


def test_normalised_look_forgets_strength_and_direction_of_light():
  plain = shots.Look(lit(picture(0), 0.6), mesh()).normalised().astype(float)
  assert plain.std() == pytest.approx(shots.CONTRAST, rel=0.05)
  from_the_left = picture(0) * 0.5 + np.linspace(0, 100, 240)[:, None]
  other = shots.Look(lit(picture(1), 1), mesh()).normalised()
  for frame in (lit(picture(0), 0.2), lit(from_the_left, 1)):
    look = shots.Look(frame, mesh()).normalised()
    assert np.median(np.abs(look - plain)) < 5
    assert np.median(np.abs(other - plain)) > shots.OTHER_PERSON + 10


def test_look_follows_a_face_that_moves_and_grows():
  scene = lit(picture(0), 1)
  larger = cv2.resize(scene, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
  before = shots.Look(scene, mesh())
  after = shots.Look(larger, 2 * mesh() + 0.5)
  assert not before.is_other_face(larger, after)
  difference = before._detail.values - after._detail.values
  assert np.median(np.abs(difference)) < 4


def test_face_that_is_mostly_covered_is_the_same_at_its_old_place():
  frame = lit(picture(0), 1)
  before = shots.Look(frame, mesh())
  covered = frame.copy()
  covered[45:95, 60:180] = (200, 150, 130)
  # What covers the eyes shifts the mesh.
  after = shots.Look(covered, mesh(110, 100, 70))
  assert not before.is_other_face(covered, after)


def test_black_and_plain_faces_are_looked_at():
  for level in (0, 128, 255):
    frame = np.full((180, 240, 3), level, np.uint8)
    look = shots.Look(frame, mesh())
    assert not look.normalised().any()
    assert not look.is_other_face(frame, shots.Look(frame, mesh()))


# --- People -------------------------------------------------------------------

RATE = 30.0


def person(seed: int) -> np.ndarray:
  """Returns float64 (468,), what a person looks like."""
  return 40 * np.random.default_rng(seed).normal(size=shots.NUM_POINTS)


def looks_of(means, seed: int = 99) -> np.ndarray:
  """Returns int8 (N, 468): looks that vary as those of a person who talks."""
  rng = np.random.default_rng(seed)
  out = []
  for mean in means:
    look = mean + 8 * rng.normal(size=len(mean))
    look *= shots.CONTRAST / look.std()
    out.append(np.clip(np.round(look), -127, 127))
  return np.array(out, np.int8)


def people(means, frames=None, rate: float = RATE) -> list[tuple[int, int]]:
  looks = looks_of(means)
  frames = np.arange(len(looks)) if frames is None else np.asarray(frames)
  return shots.person_spans(frames, looks, rate)


@pytest.mark.parametrize("length", [0, 1, 3, 12, 40, 300])
def test_one_person_is_one(length):
  looks = looks_of([person(0)] * length).reshape(length, shots.NUM_POINTS)
  assert shots.person_spans(np.arange(length), looks, RATE) == [(0, length)]


@pytest.mark.parametrize("cut", [16, 25, 26, 27, 60, 84])
def test_cut_is_found_to_the_frame(cut):
  means = [person(0)] * cut + [person(1)] * (100 - cut)
  assert people(means) == [(0, cut), (cut, 100)]


@pytest.mark.parametrize("rate", [12.0, 25.0, 29.97, 60.0])
@pytest.mark.parametrize("secs", [0.2, 0.4, 0.67, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("step", [1, 2])
def test_dissolve_parts_two_people_and_neither_holds_much_of_the_other(
  secs, rate, step
):
  around, length = round(0.8 * rate), round(secs * rate)
  shares = np.concatenate(
    [np.zeros(around), np.linspace(0, 1, length), np.ones(around)]
  )[::step]
  means = [(1 - w) * person(0) + w * person(1) for w in shares]
  frames = step * np.arange(len(means))
  first, second = people(means, frames, rate)
  assert first[0] == 0
  assert second[1] == len(means)
  assert first[1] >= around // step
  assert second[0] <= len(means) - around // step
  assert shares[: first[1]].max() < 0.45
  assert shares[second[0] :].min() > 0.55


def test_three_people_and_one_who_comes_back_are_four():
  means = [person(n) for n in (0, 1, 2, 0) for _ in range(40)]
  assert people(means) == [(0, 40), (40, 80), (80, 120), (120, 160)]


def test_glance_away_or_a_hand_does_not_part_a_person():
  means = [person(0)] * 100
  for i in range(40, 54):
    means[i] = person(1)
  assert people(means) == [(0, 100)]
  # For long, over a quarter of the points.
  for i in range(30, 70):
    means[i] = np.where(np.arange(shots.NUM_POINTS) < 120, 0, person(0))
  assert people(means) == [(0, 100)]


def test_gap_in_the_looks_is_no_change():
  frames = [*range(30), *range(42, 72)]
  assert people([person(0)] * 60, frames) == [(0, 60)]
  means = [person(0)] * 30 + [person(1)] * 30
  assert people(means, frames) == [(0, 30), (30, 60)]


def test_transition_lies_between_the_people_of_two_tracks():
  shares = np.concatenate([np.zeros(30), np.linspace(0, 1, 30), np.ones(12)])
  looks = looks_of([(1 - w) * person(0) + w * person(1) for w in shares])
  # The first track was followed into the dissolve until most was the other.
  end, start = shots.find_transition(np.arange(len(looks)), looks, 52, RATE)
  assert 30 <= end <= 44
  assert start == 52
  end, start = shots.find_transition(np.arange(len(looks)), looks, 38, RATE)
  assert end == 38
  assert 45 <= start <= 60


def test_two_tracks_of_one_person_have_no_transition():
  looks = looks_of([person(0)] * 60)
  assert shots.find_transition(np.arange(60), looks, 30, RATE) is None


def test_nothing_is_left_out_where_too_much_would_be(monkeypatch):
  shares = np.concatenate([np.zeros(30), np.linspace(0, 1, 45), np.ones(30)])
  means = [(1 - w) * person(0) + w * person(1) for w in shares]
  (_, end), (start, _) = people(means)
  assert start - end > 5
  monkeypatch.setattr(shots, "MAX_NEITHER_SECS", 0.1)
  (_, end), (start, _) = people(means)
  assert end == start
  assert 0.3 < shares[end] < 0.7


def turning(away: np.ndarray) -> np.ndarray:
  """Returns looks of a person, who changes at look 20 and slowly comes back."""
  person = 40 * np.random.default_rng(1).normal(size=shots.NUM_POINTS)
  shares = [0.0] * 20 + [1.0] * 8 + [*np.linspace(1, 0, 60)] + [0.0] * 10
  looks = [(1 - share) * person + share * away for share in shares]
  return np.clip(np.round(looks), -127, 127).astype(np.int8)


def test_a_person_who_turns_and_comes_back_is_one():
  rng = np.random.default_rng(2)
  looks = turning(
    turning(np.zeros(shots.NUM_POINTS))[0] + 30 * rng.normal(size=468)
  )
  frames = 4 * np.arange(len(looks))
  assert shots.person_spans(frames, looks, 30.0) == [(0, len(looks))]
  # One who does not come back is another.
  before, after = shots.person_spans(frames[:28], looks[:28], 30.0)
  assert (before, after) == ((0, 20), (20, 28))
