"""Random changes of clips: pixels and region bits change together."""

import dataclasses
import itertools

import numpy as np
import pytest
import simplejpeg

from marlin_jax.data import augmentation, loader, prepared_dataset
from marlin_jax.data.augmentation import Augmentation, View
from marlin_jax.data.clip_geometry import Clip
from marlin_jax.data.clips import TakeClip
from marlin_jax.data.sampling import RecordDraws
from marlin_jax.records import schema
from tests.support import made_dataset

ALL = Augmentation(
  flip_ratio=0.5,
  min_crop_ratio=0.4,
  max_crop_aspect=1.5,
  stride_jitter=1,
  colour_jitter=0.4,
)
NUM_FRAMES = 12
_GREYS = np.linspace(20, 240, len(schema.REGIONS)).round().astype(np.uint8)


def colourful(video_id: str, seed: int) -> schema.Record:
  """Returns a record in which the grey of a pixel tells its label.

  Blocks of labels, which differ from frame to frame; no face in frame 3.
  """
  np_rng = np.random.default_rng(seed)
  labels = np_rng.integers(0, 11, (NUM_FRAMES, 7, 7), np.uint8)
  labels = labels.repeat(32, 1).repeat(32, 2)
  regions = schema.region_bits(labels)
  regions[3] = 0
  return made_dataset.a_record(
    video_id,
    num_frames=NUM_FRAMES,
    frames=[
      simplejpeg.encode_jpeg(np.dstack([_GREYS[x]] * 3).copy(), 98)
      for x in labels
    ],
    regions=regions,
    parsing=schema.compress_parsing(labels),
  )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
  path = made_dataset.make(
    tmp_path_factory.mktemp("data") / "faces",
    {f"{i}.mp4": [colourful(f"{i}.mp4", i)] for i in range(4)},
  )
  return prepared_dataset.open_dataset(str(path), "train")


def take_clip(**settings) -> TakeClip:
  return TakeClip(Clip(4, 2), 2, **settings)


def batches(dataset, take, num, *, seed=0, num_clips=1, **settings):
  options = {"batch_size": 4, "start_step": 0, "num_threads": 1} | settings
  draws = RecordDraws(dataset, seed, num_clips=num_clips)
  return list(
    itertools.islice(loader.train_batches(draws, take, **options), num)
  )


def labels_of(pixels: np.ndarray) -> np.ndarray:
  """Returns the label whose grey is nearest: (..., H, W, 3) -> (..., H, W)."""
  grey = pixels[..., 1].astype(int)
  return abs(grey[..., None] - _GREYS.astype(int)).argmin(-1)


@pytest.mark.parametrize(
  ("size", "patch"), [(224, 16), (224, 8), (160, 16), (112, 16), (112, 8)]
)
def test_bits_are_those_of_the_pixels_shown(dataset, size, patch):
  """The middle of each patch shows a label that its bits name."""
  # Greys tell labels.
  views = dataclasses.replace(ALL, colour_jitter=0.0)
  take = take_clip(frame_size=size, patch_size=patch, augmentation=views)
  side, num_known = size // patch, 0
  for batch in batches(dataset, take, 2):
    assert batch["video"].shape == (4, 4, size, size, 3)
    assert batch["regions"].shape == (4, 2, side, side)
    bits = batch["regions"].astype(int)
    middle = batch["video"][:, ::2, patch // 2 :: patch, patch // 2 :: patch]
    shown = labels_of(middle)
    mirrored = batch["_view"][:, 4].astype(bool)
    shown[mirrored] = np.array(schema.MIRRORED)[shown[mirrored]]
    has_face = bits.any(axis=(2, 3), keepdims=True)
    # A grey at an edge between blocks is a mixture.
    right = ((bits >> shown) & 1 == 1) | ~has_face
    assert right.mean() > 0.9
    single = (bits & (bits - 1) == 0) & has_face
    assert right[single].mean() > 0.99
    num_known += single.sum()
  assert num_known > 100


@pytest.mark.parametrize("size", [1, 2, 7, 14])
def test_stored_bits_give_those_of_the_label_maps(dataset, size):
  record, frames = dataset.source[0][1], np.array([[0, 2, 4]])
  got = augmentation.region_bits(record, frames, [View()], size)
  label_maps = schema.decode_parsing(record)[frames[0]]
  np.testing.assert_array_equal(got[0], schema.region_bits(label_maps, size))


def test_frames_without_a_face_have_no_bits_on_any_grid(dataset):
  (record,) = (dataset.source[i][1] for i in range(1))
  for settings in ({}, {"frame_size": 160}, {"augmentation": ALL}):
    take = take_clip(**settings)
    take = dataclasses.replace(take, clip=Clip(6, 2), tubelet_size=1)
    for seed in range(4):
      clips = take.empty(1)
      frames = take.choose(clips, 0, record, np.random.default_rng(seed))
      is_faceless = np.array(frames) == 3
      assert (~clips["regions"][0].any(axis=(1, 2)) == is_faceless).all()


def test_a_mirrored_clip_is_the_mirror_image_with_sides_exchanged(dataset):
  plain, mirrored = (
    batches(dataset, take_clip(augmentation=Augmentation(flip_ratio=r)), 1)[0]
    for r in (1e-9, 1.0)
  )
  np.testing.assert_array_equal(
    mirrored["video"], plain["video"][:, :, :, ::-1]
  )
  np.testing.assert_array_equal(
    mirrored["regions"], schema.mirrored_bits(plain["regions"])
  )
  assert mirrored["_view"][:, 4].all()
  assert not plain["_view"][:, 4].any()


def test_views_are_drawn_as_asked():
  np_rng = np.random.default_rng(0)
  views = [ALL.draw_view(np_rng) for _ in range(2000)]
  rows = np.array([view.row for view in views])
  x, y, width, height, mirrored, *colours = rows.T
  assert abs(mirrored.mean() - 0.5) < 0.05
  assert (x >= 0).all()
  assert (x + width <= 224).all()
  assert (y >= 0).all()
  assert (y + height <= 224).all()
  # A wide crop of nearly the whole area is cut at the frame's edges.
  area = width * height / 224**2
  assert 0.33 < area.min() < 0.42
  assert area.max() > 0.95
  aspect = width / height
  assert 0.65 < aspect.min() < 0.7
  assert 1.43 < aspect.max() < 1.54
  assert abs(np.log(aspect).mean()) < 0.03
  for factor, shift in zip(colours[:3], colours[3:], strict=True):
    assert [factor.min(), factor.max()] == pytest.approx([154, 358], abs=2)
    assert [shift.min(), shift.max()] == pytest.approx([-40, 40], abs=1)
    assert abs(np.corrcoef(factor, shift)[0, 1]) < 0.1
  assert View.from_row(rows[0]) == views[0]


def test_colours_change_alike_in_all_frames_and_views_stay(dataset):
  one = Augmentation(flip_ratio=0.5, min_crop_ratio=0.4)
  both = dataclasses.replace(one, colour_jitter=0.3)
  plain, changed = (
    batches(dataset, take_clip(augmentation=a), 1)[0] for a in (one, both)
  )
  np.testing.assert_array_equal(plain["regions"], changed["regions"])
  for before, after, row in zip(
    plain["video"], changed["video"], changed["_view"], strict=True
  ):
    colours = np.array(View.from_row(row).colours)
    want = np.rint(before * (colours[:3] / 256) + colours[3:])
    np.testing.assert_array_equal(after, want.clip(0, 255))
  assert (plain["_view"][:, :5] == changed["_view"][:, :5]).all()
  assert (plain["_view"][:, 5:] != changed["_view"][:, 5:]).any()


def test_strides_are_drawn_as_asked(dataset):
  record = dataset.source[0][1]
  take = take_clip(augmentation=Augmentation(stride_jitter=2))
  strides = []
  for seed in range(200):
    np_rng = np.random.default_rng(seed)
    frames = take.choose(take.empty(1), 0, record, np_rng)
    assert len(frames) == 4
    strides.append(frames[1] - frames[0])
  assert set(strides) == {1, 2, 3, 4}
  assert min(map(strides.count, (1, 2, 3, 4))) > 25


def test_given_starts_are_kept_and_the_longest_clip_fits(dataset):
  record = dataset.source[0][1]
  take = take_clip(augmentation=ALL)
  assert take.longest_clip == Clip(4, 3)
  strides = set()
  for seed in range(20):
    clips, np_rng = take.empty(2), np.random.default_rng(seed)
    frames = take.place(clips, 0, record, np.array([0, 2]), np_rng)
    first, second = np.reshape(frames, (2, 4))
    assert (first[0], second[0]) == (0, 2)
    assert first[-1] < NUM_FRAMES - 1
    strides.add(int(first[1]))
  assert strides == {1, 2, 3}
  assert (clips["_view"][0] != clips["_view"][1]).any()


def test_a_clip_over_two_records_has_the_regions_of_both(dataset):
  records = [dataset.source[i][1] for i in range(2)]
  whole = schema.joined(records)
  frames, views = np.array([[10, 11, 12, 14]]), [View()]
  for size in (14, 20):
    got = augmentation.region_bits(whole, frames, views, size)[0]
    want = [
      augmentation.region_bits(record, rows, views, size)[0]
      for record, rows in zip(
        records, np.array([[[10, 11]], [[0, 2]]]), strict=True
      )
    ]
    np.testing.assert_array_equal(got, np.concatenate(want))
    assert got.any(axis=(1, 2)).all()


def test_without_augmentation_the_draws_are_those_of_before(dataset):
  (batch,) = batches(dataset, take_clip(), 1)
  assert (batch["_view"] == View().row).all()
  starts = [
    int(Clip(4, 2).random_starts(NUM_FRAMES, 1, np.random.default_rng(seed))[0])
    for seed in ((0, 1, place, 0) for place in range(4))
  ]
  assert batch["start"].tolist() == starts


@pytest.mark.parametrize("num_clips", [1, 2])
def test_draws_depend_on_seed_step_and_clip_alone(dataset, num_clips):
  take = take_clip(frame_size=112, augmentation=ALL)
  shared = {"num_clips": num_clips}
  whole = batches(dataset, take, 4, **shared)
  others = (
    (
      batches(dataset, take, 2, start_step=2, num_threads=3, **shared),
      whole[2:],
    ),
    (
      batches(dataset, take, 4, rows=[1, 2], **shared),
      [{k: x[[1, 2]] for k, x in batch.items()} for batch in whole],
    ),
  )
  for got, want in others:
    for a, b in zip(got, want, strict=True):
      for key, value in b.items():
        np.testing.assert_array_equal(a[key], value, err_msg=key)
  views = {tuple(row) for batch in whole for row in batch["_view"].tolist()}
  assert len(views) == 16
  other_seed = batches(dataset, take, 1, seed=1, **shared)[0]
  assert (other_seed["_view"] != whole[0]["_view"]).any()


def test_bits_that_no_mask_needs_are_not_computed(dataset):
  record = dataclasses.replace(dataset.source[0][1], parsing=b"")
  take = take_clip(frame_size=160, needs_regions=False, augmentation=ALL)
  clips = take.empty(1)
  take.choose(clips, 0, record, np.random.default_rng(0))
  assert not clips["regions"].any()
  take = dataclasses.replace(take, needs_regions=True)
  with pytest.raises(
    prepared_dataset.DatasetError, match=r"0\.mp4.*label maps"
  ):
    take.choose(clips, 0, record, np.random.default_rng(0))
