"""Fasking against a plain transcription of the paper's rule."""

import math

import jax
import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource

from marlin_jax.pretraining import masking
from marlin_jax.pretraining.configuration import MASKING_STRATEGIES
from marlin_jax.records import schema

GRID = (8, 14, 14)
NUM_VISIBLE = 156


def candidates_by_hand(
  label_maps, components, ratio, *, size=14, opposite=False
):
  """Applies the rule of fasking to pixels in loops: bool (T, size, size).

  Args:
    label_maps: uint8 (T, 224, 224), one a tubelet; None where no face.
    components: permutation of 0..4.
    ratio: share to hide.
    size: patches along a side.
    opposite: fasking_opp.
  """
  groups = [[2, 4], [3, 5], [6], [7, 8, 9], [10]]
  inner = [label for i in components for label in groups[i]]
  order = [*inner, 1, 0] if opposite else [0, 1, *inner]
  result = []
  for labels in label_maps:
    chosen = np.zeros((size, size), bool)
    if labels is None:
      chosen[:] = True
    else:
      for label in order:
        for h in range(size):
          for w in range(size):
            patch = labels[pixels(h, size), pixels(w, size)]
            chosen[h, w] |= (patch == label).any()
        if chosen.sum() >= round((1 - ratio) * size**2, 6):
          break
    result.append(chosen)
  return np.stack(result)


def pixels(place, size):
  """Returns the pixels of 224 that a patch touches."""
  return slice(int(224 * place / size), math.ceil(224 * (place + 1) / size))


def invented_label_maps():
  """Returns rare label maps, uint8 (8, 224, 224) each."""
  rows = np.arange(224)[:, None] + np.zeros(224, int)
  stripes = (rows // 21).astype(np.uint8)
  one_region = np.full((224, 224), 6, np.uint8)
  tiny_background = one_region.copy()
  tiny_background[:16, :48] = 0
  noise = np.random.default_rng(0).integers(0, 11, (224, 224)).astype(np.uint8)
  return [
    [stripes] * 8,
    [one_region] * 8,
    [tiny_background] * 8,
    [noise] * 8,
    [np.zeros_like(noise)] * 8,
    [None] * 8,
    [None, stripes, one_region, tiny_background, noise, None, stripes, noise],
  ]


@pytest.fixture(scope="module")
def real_label_maps(sample_dataset):
  """Returns label maps of the sample video at each tubelet's first frame."""
  source = ArrayRecordDataSource(
    [str(p) for p in sorted(sample_dataset.glob("*.array_record-*"))]
  )
  clips = []
  for data in source:
    labels = schema.decode_parsing(schema.decode(data))
    clips += [list(labels[s : s + 32 : 4]) for s in range(0, 28, 4)]
  assert len(clips) >= 14
  return clips


def bits_of(clip, size=14):
  return np.concatenate(
    [
      np.zeros((1, size, size), np.uint16)
      if labels is None
      else schema.region_bits(labels[None], size)
      for labels in clip
    ]
  )


@pytest.mark.parametrize("ratio", [0.9, 0.75, 0.5])
@pytest.mark.parametrize("opposite", [False, True])
@pytest.mark.parametrize("footage", ["real", "invented"])
def test_candidates_equal_the_rule_written_in_loops(
  request, footage, opposite, ratio
):
  clips = (
    request.getfixturevalue("real_label_maps")[::4]
    if footage == "real"
    else invented_label_maps()
  )
  np_rng = np.random.default_rng(1)
  compute = jax.jit(
    lambda bits, components: masking.fasking_candidates(
      bits,
      masking.label_order(components, opposite=opposite),
      (1 - ratio) * 196,
    )
  )
  for clip in clips:
    components = np_rng.permutation(5)
    want = candidates_by_hand(clip, components, ratio, opposite=opposite)
    got = compute(bits_of(clip).reshape(8, 196), components)
    np.testing.assert_array_equal(np.asarray(got).reshape(8, 14, 14), want)


@pytest.mark.parametrize("size", [7, 10, 20, 28])
def test_other_grids_follow_the_same_rule(real_label_maps, size):
  """112 and 160 pixels at patch 16, 160 and 224 at patch 8."""
  np_rng = np.random.default_rng(2)
  masks = masking.Masking("fasking", 0.9, (8, size, size))
  num_tokens = 8 * size**2
  assert masks.num_visible == num_tokens // 10
  clips = [*real_label_maps[:2], *invented_label_maps()[-2:]]
  for clip in clips:
    components = np_rng.permutation(5)
    want = candidates_by_hand(clip, components, 0.9, size=size)
    bits = bits_of(clip, size)
    got = masking.fasking_candidates(
      bits.reshape(8, -1), masking.label_order(components), 0.1 * size**2
    )
    np.testing.assert_array_equal(np.asarray(got).reshape(want.shape), want)
    visible, masked = split(masks, bits[None])
    assert visible.shape == (1, masks.num_visible)
    both = np.sort(np.concatenate([visible[0], masked[0]]))
    np.testing.assert_array_equal(both, np.arange(num_tokens))


def split(masks, regions, seed=0):
  keys = jax.random.split(jax.random.key(seed), len(regions))
  return jax.jit(masks)(regions, keys)


def test_exactly_156_candidates_are_visible_in_every_clip(real_label_maps):
  clips = [*real_label_maps, *invented_label_maps()]
  masks = masking.Masking("fasking", 0.9)
  assert masks.num_visible == NUM_VISIBLE
  regions = np.stack([bits_of(clip) for clip in clips])
  visible, masked = split(masks, regions)
  assert visible.shape == (len(clips), NUM_VISIBLE)
  assert masked.shape == (len(clips), 1568 - NUM_VISIBLE)
  both = np.sort(np.concatenate([visible, masked], axis=1), axis=1)
  np.testing.assert_array_equal(both, np.tile(np.arange(1568), (len(clips), 1)))
  # All visible tokens are candidates of one order, whichever was drawn.
  orders = [np.array(o) for o in _permutations(5)]
  walk = jax.jit(
    jax.vmap(
      lambda bits, order: masking.fasking_candidates(
        bits, masking.label_order(order), 0.1 * 196
      ),
      (None, 0),
    )
  )
  for i in range(len(clips)):
    allowed = np.asarray(walk(regions[i].reshape(8, 196), np.stack(orders)))
    assert allowed.reshape(len(orders), -1)[:, visible[i]].all(axis=1).any()


def _permutations(n):
  import itertools

  return list(itertools.permutations(range(n)))


def test_faces_are_hidden_more_than_background(real_label_maps):
  regions = np.stack([bits_of(clip) for clip in real_label_maps])
  hidden = {}
  for strategy in ("fasking", "random", "fasking_opp"):
    _, masked = split(masking.Masking(strategy, 0.9), regions)
    is_hidden = np.zeros((len(regions), 1568), bool)
    np.put_along_axis(is_hidden, np.asarray(masked), True, axis=1)
    flat = regions.reshape(len(regions), -1)
    hidden[strategy] = {
      "background": is_hidden[flat == 1].mean(),
      "face": is_hidden[(flat & 0b0011_1111_1100) > 0].mean(),
    }
  assert hidden["fasking"]["face"] > 0.98
  assert hidden["fasking"]["background"] < 0.85
  assert abs(hidden["random"]["face"] - 0.9) < 0.02
  assert hidden["fasking_opp"]["background"] > hidden["fasking_opp"]["face"]


def groups_by_hand(regions):
  """FSFM's groups of regions in order, bool (8, N), from bits (N,)."""

  def has(*labels):
    return np.any([(regions >> label) & 1 for label in labels], axis=0)

  return np.stack(
    [
      *(has(2, 3), has(4, 5), has(6), has(7, 8, 9), has(1) & has(0, 10)),
      *(has(10), has(1), has(0)),
    ]
  )


@pytest.mark.parametrize("ratio", [0.9, 0.75])
def test_crfr_p_hides_a_region_and_an_equal_share_of_the_others(
  real_label_maps, ratio
):
  """FSFM, section 3.1: one region whole, the others in proportion."""
  regions = np.stack([bits_of(clip) for clip in real_label_maps])
  keys = jax.random.split(jax.random.key(5), len(regions))
  masks = masking.Masking("crfr_p", ratio)
  visible, _ = jax.jit(masks)(regions, keys)
  hidden = np.asarray(masks.hidden_region(regions, keys))
  chosen = set()
  for bits, seen, region in zip(
    regions.reshape(len(regions), -1), np.asarray(visible), hidden, strict=True
  ):
    groups = groups_by_hand(bits)
    (number,) = [
      i for i, group in enumerate(groups[:6]) if (group == region).all()
    ]
    chosen.add(number)
    assert not region[seen].any()
    is_seen = np.isin(np.arange(len(bits)), seen)
    share = len(seen) / (~region).sum()
    taken = region.copy()
    for group in [*groups, np.ones_like(region)]:
      mine = group & ~taken
      assert abs(is_seen[mine].sum() - share * mine.sum()) <= 2
      taken |= mine
  assert len(chosen) >= 4


def test_a_hidden_region_too_large_for_the_ratio_is_seen_in_part():
  regions = np.full((6, *GRID), 1 << 6, np.uint16)  # all nose
  visible, _ = split(masking.Masking("crfr_p", 0.5), regions)
  assert visible.shape == (6, 784)


def test_patches_without_any_region_do_not_change_the_count():
  regions = np.zeros((1, *GRID), np.uint16)
  regions[0, :, 0, 0] = 1 << 6  # a damaged map: one patch of nose, else nothing
  visible, _ = split(masking.Masking("fasking", 0.9), regions)
  assert set(range(0, 1568, 196)) <= set(np.asarray(visible[0]).tolist())


@pytest.mark.parametrize("ratio", [0.9, 0.75])
@pytest.mark.parametrize("strategy", MASKING_STRATEGIES)
def test_every_strategy_shows_the_same_number_of_tokens(strategy, ratio):
  masks = masking.Masking(strategy, ratio)
  num_visible = {0.9: NUM_VISIBLE, 0.75: 392}[ratio]
  assert masks.num_visible == num_visible
  visible, masked = split(masks, np.ones((3, *GRID), np.uint16))
  assert visible.shape == (3, num_visible)
  both = np.sort(np.concatenate([visible, masked], axis=1), axis=1)
  np.testing.assert_array_equal(both, np.tile(np.arange(1568), (3, 1)))
  assert not (visible[0] == visible[1]).all()


def seen_by(strategy, ratio, num_clips):
  """Returns which tokens are visible: bool (clips, 8, 196)."""
  regions = np.ones((num_clips, *GRID), np.uint16)
  visible, _ = split(masking.Masking(strategy, ratio), regions)
  seen = np.zeros((num_clips, 1568), bool)
  np.put_along_axis(seen, np.asarray(visible), True, axis=1)
  return seen.reshape(num_clips, 8, 196)


@pytest.mark.parametrize(
  ("strategy", "ratio", "num_units", "unit_size"),
  [
    ("tube", 0.9, 20, 8),  # 160 tokens, of which 156 are drawn
    ("tube", 0.75, 49, 8),
    ("frame", 0.9, 1, 196),
    ("frame", 0.8, 2, 196),  # 392 tokens, of which 313 are drawn
    ("frame", 0.75, 2, 196),
  ],
)
def test_tube_and_frame_draw_units_then_tokens(
  strategy, ratio, num_units, unit_size
):
  seen = seen_by(strategy, ratio, 1000)
  per_unit = seen.sum(1 if strategy == "tube" else 2)
  assert ((per_unit > 0).sum(1) <= num_units).all()
  num_visible = masking.Masking(strategy, ratio).num_visible
  num_dropped = num_units * unit_size - num_visible
  assert 0 <= num_dropped < unit_size
  assert per_unit[per_unit > 0].min() >= unit_size - num_dropped
  # No position or tubelet is preferred: 6 standard deviations.
  expected = num_visible / 1568
  deviation = (expected * (1 - expected) / 1000) ** 0.5
  assert abs(seen.mean(0) - expected).max() < 6 * deviation


@pytest.mark.parametrize(("strategy", "axis"), [("tube", 1), ("frame", 2)])
def test_units_are_whole_where_their_tokens_add_up(strategy, axis):
  seen = seen_by(strategy, 0.75, 8)
  assert (seen.all(axis) | ~seen.any(axis)).all()


def test_a_clip_is_masked_alike_in_any_batch():
  masks = masking.Masking("fasking", 0.9)
  regions = np.random.default_rng(0).integers(1, 2048, (4, *GRID))
  regions = regions.astype(np.uint16)
  keys = jax.random.split(jax.random.key(0), 4)
  whole, _ = masks(regions, keys)
  part, _ = masks(regions[2:], keys[2:])
  np.testing.assert_array_equal(whole[2:], part)


def test_running_cells_take_turns_in_every_cell():
  keys = jax.random.split(jax.random.key(0), 2)
  hidden = np.tile(np.arange(1568, dtype=np.int32), (2, 1))
  kept = np.asarray(masking.running_cells(hidden, GRID, keys, 784))
  assert (np.diff(kept, axis=1) > 0).all()
  shown = np.zeros((2, 1568), int)
  np.put_along_axis(shown, kept, 1, axis=1)
  cells = shown.reshape(2, 8, 7, 2, 7, 2)
  # Half of each cell at every time, and each position half of the time.
  assert (cells.sum((3, 5)) == 2).all()
  assert (cells.reshape(2, 2, 4, 7, 2, 7, 2).sum(2) == 2).all()


def test_running_cells_are_exactly_as_many_of_the_hidden_tokens_as_asked():
  masks = masking.Masking("fasking", 0.9)
  regions = np.random.default_rng(0).integers(1, 2048, (2, *GRID))
  keys = jax.random.split(jax.random.key(0), 2)
  _, hidden = masks(regions.astype(np.uint16), keys)
  num_kept = masking.num_decoded(1412, 0.3)
  assert num_kept == 988
  kept = masking.running_cells(hidden, GRID, keys, num_kept)
  for clip in range(2):
    chosen = set(np.asarray(kept[clip]).tolist())
    assert len(chosen) == num_kept
    assert chosen < set(np.asarray(hidden[clip]).tolist())
