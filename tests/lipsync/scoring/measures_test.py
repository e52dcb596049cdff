"""Offsets and Frechet distances against the published formulas."""

import numpy as np
import pytest
import scipy.linalg

from marlin_jax.lipsync.scoring import frechet, offsets


def embeddings(num=60, shift=0, seed=0):
  """Returns faces and their sounds, moved `shift` frames later.

  Each face is similar to the sound of its own time only.
  """
  np_rng = np.random.default_rng(seed)
  signal = np_rng.normal(size=(num + 40, 32))
  noise = 0.1 * np_rng.normal(size=(num, 32))
  faces = signal[20 : 20 + num] + noise
  return faces, signal[20 - shift : 20 - shift + num]


def published(faces, sounds, vshift):
  """Computes calc_pdist and evaluate of SyncNetInstance.py, row by row."""
  padded = np.concatenate(
    [
      np.zeros((vshift, faces.shape[1])),
      sounds,
      np.zeros((vshift, faces.shape[1])),
    ]
  )
  rows = []
  for i in range(len(faces)):
    window = padded[i : i + 2 * vshift + 1]
    rows.append(np.sqrt(((faces[i] - window + 1e-6) ** 2).sum(axis=1)))
  mean = np.stack(rows, 1).mean(1)
  best = mean.argmin()
  return vshift - best, mean[best], np.median(mean) - mean[best]


# --- Offsets ------------------------------------------------------------------


@pytest.mark.parametrize(("num", "shift"), [(60, 0), (60, 7), (9, -2), (1, 0)])
def test_offset_and_lse_are_those_of_the_published_scorer(num, shift):
  faces, sounds = embeddings(num, shift)
  sync = offsets.measure([offsets.distances(faces, sounds)])
  offset, distance, confidence = published(faces, sounds, 15)
  assert sync.offset == offset
  assert sync.distance == pytest.approx(distance, abs=1e-9)
  assert sync.confidence == pytest.approx(confidence, abs=1e-9)
  assert sync.num_windows == num


@pytest.mark.parametrize("shift", [-15, -4, -1, 0, 1, 9, 15])
def test_later_sound_lowers_the_offset_by_as_much(shift):
  sync = offsets.measure([offsets.distances(*embeddings(shift=shift))])
  assert sync.offset == -shift
  axis = offsets.offset_axis()
  assert axis[sync.curve.argmin()] == -shift
  assert sync.confidence > 2


def test_stretches_are_weighted_by_their_windows():
  whole = offsets.distances(*embeddings())
  parts = offsets.measure([whole[:13], whole[13:]])
  np.testing.assert_allclose(parts.curve, offsets.measure([whole]).curve)


def test_embeddings_that_do_not_belong_together_are_refused():
  with pytest.raises(ValueError, match=r"\(5, 8\) and sounds \(4, 8\)"):
    offsets.distances(np.zeros((5, 8)), np.zeros((4, 8)))
  with pytest.raises(ValueError, match="no window"):
    offsets.measure([np.zeros((0, 31))])


# --- Frechet ------------------------------------------------------------------


def by_square_root(a, b):
  """Evaluates the formula with scipy and the covariances themselves."""
  root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T))
  traces = np.trace(np.cov(a.T)) + np.trace(np.cov(b.T))
  difference = a.mean(0) - b.mean(0)
  return difference @ difference + traces - 2 * np.trace(root).real


@pytest.mark.parametrize(
  ("num_a", "num_b", "rank"),
  [(200, 150, 12), (30, 30, 12), (8, 200, 12), (8, 5, 12), (50, 50, 3)],
  ids=["full", "just", "one deficient", "both deficient", "low rank"],
)
def test_frechet_distance_is_that_of_scipys_square_root(num_a, num_b, rank):
  np_rng = np.random.default_rng(0)
  mix = np_rng.normal(size=(rank, 12))
  a = np_rng.normal(size=(num_a, rank)) @ mix
  b = np_rng.normal(size=(num_b, rank)) @ (1.3 * mix) + 0.5
  distance = frechet.frechet_distance(a, b)
  # scipy's loses half of its digits if the product is singular.
  assert distance == pytest.approx(by_square_root(a, b), rel=1e-5)
  assert distance == pytest.approx(frechet.frechet_distance(b, a), rel=1e-9)


def test_frechet_distance_of_equal_sets_is_zero_and_never_negative():
  np_rng = np.random.default_rng(0)
  for num in (4, 100):
    a = np_rng.normal(size=(num, 20)).astype(np.float32)
    assert 0 <= frechet.frechet_distance(a, a[::-1]) < 1e-9
    assert frechet.frechet_distance(a, a + 2) == pytest.approx(80, rel=1e-5)


def test_features_of_other_shapes_or_not_finite_are_refused():
  with pytest.raises(ValueError, match=r"\(3, 4\) and \(3, 5\)"):
    frechet.frechet_distance(np.zeros((3, 4)), np.zeros((3, 5)))
  with pytest.raises(ValueError, match=r"\(1, 4\)"):
    frechet.frechet_distance(np.zeros((1, 4)), np.zeros((3, 4)))
  with pytest.raises(ValueError, match="not finite"):
    frechet.frechet_distance(np.full((3, 4), np.nan), np.zeros((3, 4)))
