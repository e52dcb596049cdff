"""Draws: which clips a step reads, by record, video and subject."""

import collections
import dataclasses
import functools
import pickle
import time
from concurrent import futures

import numpy as np
import pytest

from marlin_jax.data import (
  loader,
  prepared_dataset,
  sampling,
  segment_indexing,
)
from marlin_jax.data.clip_geometry import Clip
from marlin_jax.data.clips import TakeClip
from marlin_jax.data.sampling import (
  HashedOrder,
  MixedDraws,
  RecordDraws,
  SpreadDraws,
  StoredOrder,
  VideoDraws,
)
from marlin_jax.records import quality_index, schema, segment_index
from marlin_jax.records.segment_index import Video
from tests.support import made_dataset

CLIP = Clip(16, 2)  # 31 frames


def described(num_records, num_videos=1):
  """Returns a data set without its files."""
  return prepared_dataset.Dataset(
    path="data",
    split="train",
    shards=(),
    lengths=(),
    num_records=num_records,
    num_videos=num_videos,
    num_frames=60 * num_records,
    fingerprint="f" * 64,
  )


# --- records ------------------------------------------------------------------


@pytest.mark.parametrize("order", sampling.ORDERS.values())
def test_every_pass_over_many_records_has_an_order_of_its_own(order):
  draws = RecordDraws(described(1000), seed=3, order=order)

  def record(position):
    (number,) = draws(position).records
    return number

  passes = [[record(1000 * i + j) for j in range(1000)] for i in range(3)]
  for numbers in passes:
    assert sorted(numbers) == list(range(1000))
    # Neighbours on disk are not neighbours in the order.
    assert np.mean(np.abs(np.diff(numbers)) < 10) < 0.05
  assert np.mean(np.equal(passes[0], passes[1])) < 0.05
  assert np.mean(np.equal(passes[1], passes[2])) < 0.05
  # Draws do not depend on the order of access.
  assert record(0) == passes[0][0]


def test_an_order_in_windows_stays_near_on_disk():
  order = functools.partial(HashedOrder, window=64)
  draws = RecordDraws(described(1000), seed=3, order=order)
  passes = np.array([draws(i).records[0] for i in range(3000)]).reshape(3, -1)
  for numbers in passes:
    assert sorted(numbers) == list(range(1000))
    # 8 stretches of 8 records in a window, and nowhere in the order of disk.
    for first in range(0, 960, 64):
      assert len(np.unique(numbers[first : first + 64] // 8)) == 8
    assert np.mean(np.diff(numbers) == 1) < 0.05
  assert np.mean(np.equal(passes[0], passes[1])) < 0.05
  again = RecordDraws(described(1000), seed=3, order=order)
  assert again(1234).records[0] == passes[1, 234]
  assert pickle.loads(pickle.dumps(again))(17).records[0] == passes[0, 17]


def test_runs_of_earlier_versions_keep_their_order():
  draws = RecordDraws(described(5), seed=3, order=StoredOrder)
  found = [draws(i) for i in range(10)]
  for num_passes in range(2):
    np_rng = np.random.default_rng((3, 0, num_passes))
    of_pass = found[5 * num_passes :][:5]
    assert [draw.records[0] for draw in of_pass] == [*np_rng.permutation(5)]
  assert draws(7, 2).seed == (3, 1, 7, 2)
  assert draws(7, 2).records == ((found[7].records[0] + 2) % 5,)


def test_reader_threads_that_meet_a_new_pass_shuffle_once(monkeypatch):
  calls = []
  default_rng = np.random.default_rng

  def slow(seed):
    calls.append(seed)
    time.sleep(0.05)
    return default_rng(seed)

  monkeypatch.setattr(np.random, "default_rng", slow)
  order = StoredOrder(100, seed=71)
  with futures.ThreadPoolExecutor(6) as pool:
    drawn = list(pool.map(order, range(6)))
  assert calls == [(71, 0, 0)]
  assert len(set(drawn)) == 6


# --- videos -------------------------------------------------------------------

# Records in the order of their last frames, as data_prep writes them: tracks 0
# and 1 are seen together.
TRACKS = {0: [35, 35, 34], 1: [20], 2: [40]}
SEGMENTS = [(0, 35), (1, 20), (0, 35), (0, 34), (2, 40)]


@pytest.fixture
def opened(tmp_path):
  """Returns a function that writes and opens an index."""

  def open_index(*videos):
    path = tmp_path / "index.npy"
    path.write_bytes(segment_index.pack(videos))
    return segment_index.open_index(path)

  return open_index


def video_of(index, draw):
  return int(np.searchsorted(index.first_records, draw.records[0], "right")) - 1


def test_each_video_is_drawn_once_per_pass_however_long_it_is(opened):
  np_rng = np.random.default_rng(0)
  # As many frames as the videos of YouTube Faces: 48 to 2157.
  lengths = np.geomspace(48, 2157, 200).astype(int)
  np_rng.shuffle(lengths)
  videos = [Video("", [(0, 64)] * -(-n // 64)) for n in lengths.tolist()]
  index = opened(*videos)
  draws = VideoDraws(
    described(index.num_records, index.num_videos), index, CLIP, seed=0
  )
  for num_passes in range(3):
    drawn = [video_of(index, draws(200 * num_passes + i)) for i in range(200)]
    assert sorted(drawn) == list(range(200))


def test_every_start_in_a_video_is_equally_likely(opened):
  index = opened(Video("", [(0, 64)]), Video("", SEGMENTS))
  draws = VideoDraws(described(6, 2), index, CLIP, seed=0)
  counts = collections.Counter()
  for position in range(8000):
    draw = draws(position)
    first = draw.records[0] - 1
    if first < 0:
      assert draw.records == (0,)
      assert 0 <= draw.starts[0] <= 64 - CLIP.span
      continue
    (start,) = draw.starts.tolist()
    track, length = SEGMENTS[first]
    assert 0 <= start < length
    before = sum(n for t, n in SEGMENTS[:first] if t == track)
    counts[track, before + start] += 1
    # The records up to the clip's last frame, all of one track.
    held = [SEGMENTS[number - 1] for number in draw.records]
    assert {t for t, _ in held} == {track}
    lengths = [n for _, n in held]
    end = start + CLIP.span
    assert sum(lengths[:-1]) < end
    assert sum(lengths) >= end or track == 1  # shorter than a clip
  possible = [
    (track, start)
    for track, lengths in TRACKS.items()
    for start in range(max(sum(lengths) - CLIP.span, 0) + 1)
  ]
  assert set(counts) == set(possible)
  assert len(possible) == 74 + 1 + 10
  expected = 4000 / len(possible)
  chi_square = sum((counts[p] - expected) ** 2 / expected for p in possible)
  # 84 degrees of freedom: mean 84, standard deviation 13.
  assert chi_square < 84 + 5 * 13


def test_a_subject_is_drawn_once_per_pass_and_each_of_its_videos_as_often(
  opened,
):
  index = opened(
    Video("ann", [(0, 64)]),
    Video("", [(0, 64)]),
    Video("bob", [(0, 64)] * 10),
    Video("ann", [(0, 64)] * 30),
    Video("", [(0, 64)]),
    Video("ann", [(0, 31)]),
  )
  draws = VideoDraws(
    described(index.num_records), index, CLIP, seed=0, by_subject=True
  )
  assert index.num_subjects == 4
  counts = collections.Counter()
  for num_passes in range(900):
    drawn = [video_of(index, draws(4 * num_passes + i)) for i in range(4)]
    assert len({min(video, 3) if video != 5 else 0 for video in drawn}) >= 3
    counts.update(drawn)
  assert [counts[video] for video in (1, 2, 4)] == [900] * 3
  for video in (0, 3, 5):
    assert 220 < counts[video] < 380  # 300, sd 14


def test_draws_of_a_subject_in_a_row_are_of_different_videos(opened):
  index = opened(
    Video("ann", [(0, 64)]),
    Video("", [(0, 64), (1, 64)]),
    Video("ann", [(0, 64)]),
    Video("ann", [(0, 64)]),
  )
  draws = VideoDraws(
    described(5, 4), index, CLIP, 0, by_subject=True, draws_per_unit=2
  )
  pairs = collections.Counter()
  for turn in range(300):
    pair = [draws(2 * turn + member) for member in range(2)]
    assert pair[0].subject == pair[1].subject
    videos = [video_of(index, draw) for draw in pair]
    pairs[tuple(videos)] += 1
    if videos[0] == 1:  # of nobody else: two clips of one track
      assert pair[0].records == pair[1].records
  # Each of the two subjects once per pass, and each pair of videos as often.
  assert pairs.pop((1, 1)) == 150
  assert len(pairs) == 6
  assert min(pairs.values()) > 10  # 25, sd 5


def test_draws_of_a_video_in_a_row_are_of_one_track(opened):
  index = opened(Video("ann", SEGMENTS), Video("", [(0, 64)]))
  draws = VideoDraws(described(6, 2), index, CLIP, seed=0, draws_per_unit=3)
  starts = collections.Counter()
  for turn in range(600):
    drawn = [draws(3 * turn + member) for member in range(3)]
    assert len({video_of(index, draw) for draw in drawn}) == 1
    assert len({draw.subject for draw in drawn}) == 1
    if drawn[0].records[0] < 5:
      tracks = {SEGMENTS[draw.records[0]][0] for draw in drawn}
      assert len(tracks) == 1
      starts[tracks.pop(), drawn[1].records[0], *drawn[1].starts] += 1
  # Any start of any track.
  assert len({track for track, *_ in starts}) == 3
  assert len(starts) > 60
  copy = pickle.loads(pickle.dumps(draws))
  assert repr(copy(1001)) == repr(draws(1001))


def test_draws_in_a_row_are_of_one_data_set(opened):
  index = opened(*[Video("", [(0, 64)])] * 5)
  parts = [
    VideoDraws(described(5, 5), index, CLIP, seed, draws_per_unit=2)
    for seed in range(2)
  ]
  draws = MixedDraws(parts, [1, 1], seed=0, draws_per_unit=2)
  drawn = [draws(position) for position in range(4000)]
  for first, second in zip(drawn[::2], drawn[1::2], strict=True):
    assert first.dataset == second.dataset
    assert first.records == second.records
  for i, part in enumerate(parts):
    found = [draw for draw in drawn if draw.dataset == i]
    expected = [part(position) for position in range(len(found))]
    assert [d.starts.tolist() for d in found] == [
      d.starts.tolist() for d in expected
    ]


def test_only_videos_and_tracks_of_the_wanted_quality_are_drawn(opened):
  # ann has tracks of two qualities; bob's video is left out.
  index = opened(
    Video("ann", [(0, 35), (1, 40), (0, 35)]),
    Video("bob", [(0, 50)]),
    Video("cy", [(0, 31)]),
    Video("ann", [(0, 31)]),
  )
  rows = quality_index.unpack(
    quality_index.pack(
      [[quality] * 5 for quality in qualities]
      for qualities in ([0.9, 0.2, 0.9], [0.1], [0.8], [0.3])
    )
  )
  selection = quality_index.select(rows, 0.5)
  whole = described(6, 4)
  dataset = dataclasses.replace(
    whole,
    num_records=3,
    num_videos=2,
    selection=selection,
    unfiltered=whole,
  )
  for by_subject in (False, True):
    draws = VideoDraws(dataset, index, CLIP, seed=0, by_subject=by_subject)
    assert draws.clips_per_epoch == 2
    drawn = [draws(i).records for i in range(400)]
    assert {*drawn} == {(0,), (2,), (0, 2), (4,)}
    assert sum(records == (4,) for records in drawn) == 200


def test_other_records_are_tried_for_a_draw_that_cannot_be_read(opened):
  index = opened(Video("", [(0, 40)]), Video("", [(0, 64)] * 5))
  draws = VideoDraws(described(6, 2), index, CLIP, seed=0)
  attempts = [draws(0, attempt) for attempt in range(60)]
  assert {draw.records[0] for draw in attempts} == set(range(6))
  assert draws(0, 3).records == attempts[3].records


def test_draws_travel_to_other_processes(opened):
  index = opened(Video("ann", SEGMENTS), Video("", [(0, 64)]))
  for draws in (
    VideoDraws(described(6, 2), index, CLIP, seed=0),
    RecordDraws(described(6), seed=0),
    RecordDraws(described(6), seed=0, order=StoredOrder),
  ):
    copy = pickle.loads(pickle.dumps(draws))
    for position in range(20):
      assert repr(copy(position)) == repr(draws(position))


def test_the_draws_of_a_seed_never_change(opened):
  """Runs that have begun go on with them."""
  index = opened(Video("", SEGMENTS), Video("", [(0, 64)] * 9))
  draws = VideoDraws(described(14, 2), index, CLIP, seed=0)
  found = [(draw.records, *draw.starts) for draw in map(draws, range(4))]
  assert found == [((9,), 32), ((2, 3), 23), ((0, 2), 12), ((11,), 0)]
  draws = RecordDraws(described(14), seed=0)
  assert [draws(i).records[0] for i in range(14)] == [
    3,
    10,
    9,
    6,
    8,
    0,
    7,
    12,
    2,
    5,
    13,
    11,
    1,
    4,
  ]


# --- several data sets --------------------------------------------------------


def test_each_data_set_has_its_share_and_its_own_order():
  parts = [RecordDraws(described(n), seed=n) for n in (7, 1000)]
  draws = MixedDraws(parts, [1, 3], seed=0)
  assert draws.datasets == (*parts[0].datasets, *parts[1].datasets)
  drawn = [draws(position) for position in range(20_000)]
  for i, share in enumerate((2500, 7500)):
    for first in (0, 10_000):
      block = drawn[first : first + 10_000]
      assert sum(draw.dataset == i for draw in block) == share
    # Pass after pass, as if the data set were alone.
    assert [draw.records for draw in drawn if draw.dataset == i] == [
      parts[i](position).records for position in range(2 * share)
    ]
  # They are mixed: the shares hold in short runs, too.
  firsts = np.array([draw.dataset for draw in drawn]).reshape(-1, 100)
  assert (np.abs(firsts.sum(1) - 75) < 25).all()
  assert draws(12_345, 2).dataset == drawn[12_345].dataset
  copy = pickle.loads(pickle.dumps(draws))
  assert repr(copy(12_345)) == repr(drawn[12_345])


def test_records_of_several_data_sets_are_numbered_on():
  datasets = [described(5), described(3), described(2)]
  assert sampling.first_ids(datasets) == [0, 5, 8]
  draws = SpreadDraws(datasets, 9)
  assert [draws(i).dataset for i in range(9)] == [0, 1, 2] * 3
  assert [draws(i).records[0] for i in range(0, 9, 3)] == [0, 1, 3]


# --- reading ------------------------------------------------------------------


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
  """Two videos whose tracks show their frame numbers; two records of each."""
  videos = {}
  for i, name in enumerate(("a.mp4", "b.mp4")):
    segments = []
    for segment in range(2):
      record = made_dataset.a_record(name, 0, segment, num_frames=32)
      numbers = 100 * i + 32 * segment + np.arange(32)
      segments.append(made_dataset.showing(record, numbers))
    videos[name] = segments
  path = tmp_path_factory.mktemp("counting") / "dataset"
  return made_dataset.make(path, videos)


def test_a_batch_tells_people_apart_over_data_sets(tmp_path):
  parts = []
  for name, people in (("one", "aba"), ("two", "ca")):
    videos = {
      f"{i}.mp4": [made_dataset.a_record(f"{i}.mp4", subject_id=person)]
      for i, person in enumerate(people)
    }
    path = made_dataset.make(tmp_path / name, videos)
    dataset = prepared_dataset.open_dataset(str(path), "train")
    index = segment_indexing.open_index(dataset, tmp_path)
    parts.append(VideoDraws(dataset, index, Clip(2, 1), seed=0))
  batches = loader.train_batches(
    MixedDraws(parts, [1, 1], seed=0),
    TakeClip(Clip(2, 1), tubelet_size=2),
    batch_size=40,
    start_step=0,
    num_threads=1,
  )
  batch = next(batches)
  found = {*zip(batch["_id"].tolist(), batch["_subject"].tolist(), strict=True)}
  # A name in two data sets may be of two people.
  assert found == {(0, 0), (1, 1), (2, 0), (3, 3), (4, 4)}


def test_a_clip_goes_on_from_one_record_to_the_next(counting, opened):
  dataset = prepared_dataset.open_dataset(str(counting), "train")
  index = opened(*2 * [Video("", [(0, 32)] * 2)])
  clip = Clip(4, 3)
  batches = loader.train_batches(
    VideoDraws(dataset, index, clip, seed=0),
    TakeClip(clip, tubelet_size=2),
    batch_size=40,
    start_step=0,
    num_threads=1,
  )
  batch = next(batches)
  source = dataset.source
  num_spanning = 0
  for number, start, video, regions in zip(
    *(batch[key] for key in ("_id", "start", "video", "regions")), strict=True
  ):
    _, record = source[int(number)]
    frames = made_dataset.shown(video)
    first = made_dataset.shown(schema.decode_frames(record, [start]))[0]
    assert frames == [first + 3 * i for i in range(4)]
    assert regions.shape == (2, 14, 14)
    num_spanning += start + clip.span > 32
  assert 2 <= num_spanning < 20
