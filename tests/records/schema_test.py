"""The record schema."""

import dataclasses
import gc
import math

import numpy as np
import pytest
import simplejpeg
from google.protobuf import message
from google.protobuf.descriptor import Descriptor

from marlin_jax.data import prepared_dataset
from marlin_jax.records import schema


@pytest.fixture(scope="module")
def record() -> schema.Record:
  np_rng = np.random.default_rng(0)
  size = schema.FRAME_SIZE
  smooth = np.linspace(0, 255, size).astype(np.uint8)
  frames = [
    simplejpeg.encode_jpeg(
      np.dstack([np.roll(np.tile(smooth, (size, 1)), 9 * i, 1)] * 3).copy(),
      quality=95,
    )
    for i in range(5)
  ]
  labels = np_rng.integers(0, 11, (5, size, size)).astype(np.uint8)
  return schema.Record(
    frames=frames,
    regions=schema.region_bits(labels),
    parsing=schema.compress_parsing(labels),
    boxes=np_rng.normal(size=(5, 4)).astype(np.float32),
    video_id="a folder/ünï.mp4",
    track_id=2,
    segment=1,
    subject_id="Ada",
    fps=29.97,
    start_secs=0.5,
    quality=0.25,
    quality_terms=np.float32([0.5, 1.0, 0.75, 0.25]),
    labels={
      "action": np.float32([1, 0, np.nan]),
      "emotion": np.float32([4]),
    },
    audio=np.arange(1000, dtype="<i2").tobytes(),
    mel=np_rng.normal(size=(13, 80)).astype(np.float32),
  )


def test_decode_is_the_inverse_of_encode(record):
  decoded = schema.decode(schema.encode(record))
  for field in dataclasses.fields(record):
    want, got = getattr(record, field.name), getattr(decoded, field.name)
    if isinstance(want, float):
      assert got == np.float32(want)
    elif field.name == "labels":
      np.testing.assert_equal(got, want)
    else:
      np.testing.assert_array_equal(got, want)
      assert np.asarray(got).dtype == np.asarray(want).dtype


def test_a_record_needs_neither_labels_nor_sound(record):
  plain = dataclasses.replace(
    record, labels={}, audio=None, mel=np.zeros((0, 80), np.float32)
  )
  decoded = schema.decode(schema.encode(plain))
  assert decoded.labels == {}
  assert decoded.audio is None
  assert decoded.mel.shape == (0, 80)


def test_decoding_uses_the_same_message_classes_all_the_time(record):
  """A class that only the parser knows is collected while threads decode."""

  pool = schema._Example.DESCRIPTOR.file.pool

  def message_classes():
    return {
      id(x): x.__name__
      for x in message.Message.__subclasses__()
      if isinstance(x.__dict__.get("DESCRIPTOR"), Descriptor)
      and x.DESCRIPTOR.file.pool is pool
    }

  schema.decode(schema.encode(record))
  before = message_classes()
  gc.collect()
  schema.decode(schema.encode(record))
  assert message_classes() == before
  assert set(before.values()) >= {"Example", "Feature", "BytesList"}


def test_the_same_record_gives_the_same_bytes(record):
  data = schema.encode(record)
  assert data == schema.encode(schema.decode(data))


def test_region_bits_say_which_labels_touch_a_patch():
  labels = np.zeros((1, 224, 224), np.uint8)
  labels[0, 16:32, 32:48] = 1
  labels[0, 31, 47] = 10
  bits = schema.region_bits(labels)
  assert bits.shape == (1, 14, 14)
  assert bits.dtype == np.uint16
  assert bits[0, 1, 2] == (1 << 1) | (1 << 10)
  assert bits[0, 0, 0] == 1


def touching_labels(labels, size, h, w):
  """Returns the labels that overlap patch (h, w) of size x size patches."""
  rows, columns = (
    slice(int(224 * i / size), math.ceil(224 * (i + 1) / size)) for i in (h, w)
  )
  return set(np.unique(labels[rows, columns]).tolist())


@pytest.mark.parametrize("size", [7, 10, 20, 28])
def test_region_bits_of_any_grid_say_which_labels_touch_a_patch(size):
  labels = np.random.default_rng(0).integers(0, 11, (1, 56, 56), np.uint8)
  labels = labels.repeat(4, 1).repeat(4, 2)
  bits = schema.region_bits(labels, size)
  assert bits.shape == (1, size, size)
  for h in range(size):
    for w in range(size):
      want = touching_labels(labels[0], size, h, w)
      assert bits[0, h, w] == sum(1 << label for label in want)
  code = np.array(schema.MIRRORED, np.uint8)
  mirrored = schema.region_bits(code[labels[:, :, ::-1]], size)
  np.testing.assert_array_equal(schema.mirrored_bits(bits), mirrored)


def test_left_and_right_are_exchanged_in_a_mirrored_picture():
  names = [schema.REGIONS[code] for code in schema.MIRRORED]
  assert names[2:6] == ["left_brow", "right_brow", "left_eye", "right_eye"]
  assert names[:2] + names[6:] == [*schema.REGIONS[:2], *schema.REGIONS[6:]]


def test_missing_label_maps_are_an_error_that_names_the_record(record):
  for parsing in (b"", b"not zstd", schema.compress_parsing(np.zeros(3))):
    bad = dataclasses.replace(record, parsing=parsing)
    with pytest.raises(ValueError, match=r"ünï.mp4#2.1: .*prepare"):
      schema.decode_parsing(bad)


def decode_at(record, size, **box):
  out = np.empty((len(record), size, size, 3), np.uint8)
  return schema.decode_frames(record, range(len(record)), out, **box)


@pytest.mark.parametrize("size", [160, 112, 96])
def test_smaller_frames_are_antialiased(record, size):
  """Stripes of one pixel become grey."""
  stripes = np.zeros((224, 224, 3), np.uint8)
  stripes[:, ::2] = 255
  striped = dataclasses.replace(
    record, frames=[simplejpeg.encode_jpeg(stripes, 98)]
  )
  inside = decode_at(striped, size)[0, 8:-8, 8:-8].astype(int)
  assert abs(inside - 127).max() < 40
  assert schema.decode_frames(striped, [0]).std() > 110


def test_frames_are_scaled_as_pictures_are(sample_dataset):
  """Training decodes JPEG files at the size that inference scales crops to.

  Below 224 pixels the difference is that of libjpeg's own scaling, which is
  used for half the size and less.
  """
  record = first_record(sample_dataset)
  full = schema.decode_frames(record, range(len(record)))
  for size, mean, most in ((160, 0, 0), (112, 0.6, 12), (96, 0.9, 12)):
    want = np.stack([schema.resized(frame, size) for frame in full])
    difference = abs(decode_at(record, size).astype(int) - want)
    assert difference.mean() <= mean
    assert difference.max() <= most
  box = schema.Box(20, 30, 150, 120)
  want = np.stack(
    [schema.resized(frame[30:150, 20:170].copy(), 112) for frame in full]
  )
  # Edges see pixels beyond the part.
  got = decode_at(record, 112, box=box)[:, 3:-3, 3:-3].astype(int)
  assert abs(got - want[:, 3:-3, 3:-3]).max() <= 1


def first_record(sample_dataset) -> schema.Record:
  dataset = prepared_dataset.open_dataset(str(sample_dataset), "train")
  return dataset.source[0][1]


def test_decode_frames_returns_the_chosen_frames_in_order(record):
  every = schema.decode_frames(record, range(5))
  some = schema.decode_frames(record, [3, 0, 3])
  np.testing.assert_array_equal(some, every[[3, 0, 3]])


def test_a_repeated_frame_is_decoded_once(record):
  """Each frame of this record can be read only once."""

  class Once(list):
    def __getitem__(self, index):
      frame, self[index] = super().__getitem__(index), b"gone"
      return frame

  once = dataclasses.replace(record, frames=Once(record.frames))
  out = np.empty((4, 224, 224, 3), np.uint8)
  assert schema.decode_frames(once, [2, 1, 2, 2], out) is out
  every = schema.decode_frames(record, range(5))
  np.testing.assert_array_equal(out, every[[2, 1, 2, 2]])


def test_label_maps_survive(record):
  labels = schema.decode_parsing(record)
  np.testing.assert_array_equal(schema.region_bits(labels), record.regions)


def stored_at(record, size) -> schema.Record:
  """Returns the record as `--frame_size` stores it."""
  every = range(len(record))
  out = np.empty((len(record), size, size, 3), np.uint8)
  schema.decode_frames(record, every, out)
  frames = [simplejpeg.encode_jpeg(x, 98) for x in out]
  return dataclasses.replace(record, frames=frames)


@pytest.mark.parametrize("stored", [208, 160, 112, 32])
def test_records_of_smaller_frames_give_the_same_clips(sample_dataset, stored):
  record = first_record(sample_dataset)
  record = dataclasses.replace(record, frames=list(record.frames[:3]))
  small = stored_at(record, stored)
  for size in (stored, stored // 2, 16):
    for box in (schema.WHOLE, schema.Box(16, 80, 144, 144)):
      difference = abs(
        decode_at(small, size, box=box).astype(int)
        - decode_at(record, size, box=box)
      )
      assert difference.mean() < 5, (size, box)
  assert schema.decode_frames(small, [0]).shape == (1, 224, 224, 3)


def test_a_record_has_one_size_and_a_known_one(record):
  small = stored_at(record, 112)
  mixed = dataclasses.replace(small, frames=[*small.frames[:4], *record.frames])
  with pytest.raises(ValueError, match="frame 4 is not a 112x112 JPEG"):
    schema.decode_frames(mixed, [4])
  for shape in ((112, 96), (100, 100), (240, 240)):
    frames = [simplejpeg.encode_jpeg(np.zeros((*shape, 3), np.uint8))] * 5
    bad = dataclasses.replace(record, frames=frames)
    with pytest.raises(ValueError, match=f"it has {shape[1]}x{shape[0]} pix"):
      schema.decode_frames(bad, [4])


def test_a_frame_of_another_size_is_named(record):
  small = simplejpeg.encode_jpeg(np.zeros((16, 16, 3), np.uint8))
  bad = dataclasses.replace(record, frames=[*record.frames[:4], small])
  with pytest.raises(ValueError, match=r"ünï.mp4#2.1: frame 4 .*prepare"):
    schema.decode_frames(bad, [4])


def test_parts_of_different_length_are_refused(record):
  bad = dataclasses.replace(record, regions=record.regions[:3])
  with pytest.raises(ValueError, match=r"regions has shape \(3, 14, 14\)"):
    schema.encode(bad)


@pytest.mark.parametrize("data", [b"", b"no example", b"\x0a\x02\x0a\x00"])
def test_other_bytes_are_refused(data):
  with pytest.raises(ValueError, match="record feature|tf.train.Example"):
    schema.decode(data)


def test_truncated_bytes_are_refused(record):
  with pytest.raises(ValueError, match="tf.train.Example"):
    schema.decode(schema.encode(record)[:-7])
