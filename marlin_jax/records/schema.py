"""The record schema, shared by data_prep and marlin_jax: bytes <-> numpy.

A record is one segment of one face track: up to a few dozen consecutive
224x224 face crops, and their regions, boxes, quality, labels and sound. On disk
it is a `tf.train.Example` in an ArrayRecord shard of a TFDS data set directory,
so that `tfds.builder_from_directory(...)` reads it too. This module parses it
without TensorFlow or TFDS and decodes only the frames asked for.

Axes: T frames, H W pixels (224), h w patches (14), S pixels of the network's
square picture.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from google.protobuf import (
  descriptor_pb2,
  descriptor_pool,
  message,
  message_factory,
  text_format,
)

# Increased whenever the meaning of a feature changes; kept in metadata.json.
SCHEMA_VERSION = 2
# Version of decoding, tracking and labelling: raised when the same video gives
# other records. 2: pixels as a viewer sees them, looks normalised for light. 3:
# tracks in seconds, a person who turns is one track, frames beside damage. 4:
# new faces are looked for every 0.3 s.
ALGORITHM_VERSION = 4

FRAME_SIZE = 224
# Sizes at which records may store their frames: whole blocks of JPEG files with
# colour at half the size. Boxes, label maps and bits are of FRAME_SIZE in all.
STORED_SIZES = range(32, FRAME_SIZE + 1, 16)
PATCH_SIZE = 16
GRID_SIZE = FRAME_SIZE // PATCH_SIZE

# LaPa's classes (Liu et al., "A New Dataset and Boundary-Attention Semantic
# Segmentation for Face Parsing", AAAI 2020); the position is the label code.
# Left and right are those of the person shown.
REGIONS = (
  "background",
  "skin",
  "right_brow",
  "left_brow",
  "right_eye",
  "left_eye",
  "nose",
  "upper_lip",
  "inner_mouth",
  "lower_lip",
  "hair",
)
# Codes of a mirrored picture: what was left is right.
MIRRORED = tuple(
  REGIONS.index(
    {"right": "left", "left": "right"}.get(side, side) + joint + rest
  )
  for side, joint, rest in (name.partition("_") for name in REGIONS)
)

# Terms of a track's quality, each in [0, 1]; see data_prep.faces.quality.
QUALITY_TERMS = ("size", "sharpness", "pose", "landmarks")

# The clip of the paper: 16 frames, every second one. It spans 31 frames of a
# record, from its first frame to its last.
CLIP_FRAMES, CLIP_STRIDE = 16, 2
CLIP_SPAN = (CLIP_FRAMES - 1) * CLIP_STRIDE + 1

SAMPLE_RATE = 16_000
NUM_MELS = 80

_LABEL = "label_"


class Box(NamedTuple):
  """Part of a frame, in whole pixels.

  Attributes:
    x, y: left upper corner.
    width, height: size.
  """

  x: int
  y: int
  width: int
  height: int

  def of(self, pictures: np.ndarray) -> np.ndarray:
    """Returns the part: (T, H, W) -> (T, height, width)."""
    return pictures[
      :, self.y : self.y + self.height, self.x : self.x + self.width
    ]


WHOLE = Box(0, 0, FRAME_SIZE, FRAME_SIZE)


@dataclasses.dataclass(frozen=True)
class Record:
  """A segment of a face track.

  Attributes:
    frames: T JPEG files, RGB, quality 95, all of one of STORED_SIZES.
    regions: uint16 (T, 14, 14); bit k is set if LaPa class k touches the patch;
      all zero in a frame without a parsed face.
    parsing: zstd-compressed uint8 (T, 224, 224) of LaPa label codes.
    boxes: float32 (T, 4), the crop as x0, y0, x1, y1 in source pixels. It may
      extend beyond the frame; the crop is black there.
    video_id: path of the source relative to its root, unique in the data set.
    track_id: number of the face track in the video.
    segment: number of the segment in the track.
    subject_id: identity of the person if known, else ''.
    fps: frames per second, those of the video unless it was resampled; 0 for a
      picture.
    start_secs: time of the first frame in the source, in seconds.
    quality: score of the track in [0, 1]; higher is better.
    quality_terms: float32 (4,), the score's terms, ordered as QUALITY_TERMS.
    labels: labels of the video by name: float32 (K,), NaN if unknown.
      metadata.json defines the meaning of the numbers.
    audio: sound of the segment, 16-bit little-endian PCM, 16 kHz, mono; empty
      if the video has no sound, None in a data set without sound.
    mel: float32 (N, 80), log-mel spectrogram of the sound, 80 rows per second;
      (0, 80) without sound.
  """

  frames: Sequence[bytes]
  regions: np.ndarray
  parsing: bytes
  boxes: np.ndarray
  video_id: str
  track_id: int
  segment: int
  subject_id: str
  fps: float
  start_secs: float
  quality: float
  quality_terms: np.ndarray
  labels: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  audio: bytes | None = None
  mel: np.ndarray = dataclasses.field(
    default_factory=lambda: np.zeros((0, NUM_MELS), np.float32)
  )

  def __len__(self) -> int:
    return len(self.frames)

  @property
  def name(self) -> str:
    """Unique name in the data set, for logs and errors."""
    return f"{self.video_id}#{self.track_id}.{self.segment}"

  @functools.cached_property
  def stored_size(self) -> int:
    """Side of the square frames in pixels, read from the first.

    Raises:
      ValueError: it is none of STORED_SIZES.
    """
    import simplejpeg

    try:
      height, width, *_ = simplejpeg.decode_jpeg_header(self.frames[0])
      if height != width or height not in STORED_SIZES:
        raise ValueError(f"it has {width}x{height} pixels")
    except ValueError as e:
      raise ValueError(
        f"record {self.name}: frame 0 is not a {FRAME_SIZE}x{FRAME_SIZE} JPEG, "
        f"or one smaller by a multiple of {STORED_SIZES.step} ({e}); prepare "
        "the data set again"
      ) from e
    return height


def median_side(record: Record) -> float:
  """Returns the median side of a record's crop in pixels of the video.

  Rounded to the digits of a float32, so that it survives JSON.
  """
  sides = record.boxes[:, 2] - record.boxes[:, 0]
  return float(str(np.float32(np.median(sides))))


class _JoinedFrames(Sequence):
  """Frames of several records, without copies."""

  def __init__(self, parts: Sequence[Sequence[bytes]]):
    self._parts = parts
    self._ends = list(itertools.accumulate(map(len, parts)))

  def __len__(self) -> int:
    return self._ends[-1]

  def __getitem__(self, index: int) -> bytes:
    i = bisect.bisect_right(self._ends, index)
    first = self._ends[i] - len(self._parts[i])
    return self._parts[i][index - first]


def joined(records: Sequence[Record]) -> Record:
  """Returns consecutive records of a track as one.

  It has the frames, regions, label maps and sound of all; everything else is
  the first record's.
  """
  if len(records) == 1:
    return records[0]
  return dataclasses.replace(
    records[0],
    frames=_JoinedFrames([record.frames for record in records]),
    regions=np.concatenate([record.regions for record in records]),
    parsing=b"".join(record.parsing for record in records),
    audio=(
      None
      if records[0].audio is None
      else b"".join(record.audio or b"" for record in records)
    ),
    mel=np.concatenate([record.mel for record in records]),
  )


def region_bits(
  label_maps: np.ndarray, grid_size: int = GRID_SIZE
) -> np.ndarray:
  """Returns the regions that touch each patch, as bits.

  Args:
    label_maps: uint8 (T, H, W) of LaPa codes.
    grid_size: h = w, patches along a side. Where it does not divide the pixels,
      a pixel on the edge of two patches touches both.

  Returns:
    uint16 (T, h, w); bit k is set if any pixel of the patch has code k.
  """
  bits = np.left_shift(np.uint16(1), label_maps, dtype=np.uint16)
  for axis in (1, 2):
    num_pixels, patch = bits.shape[axis], np.arange(grid_size)
    first = patch * num_pixels // grid_size
    last = ((patch + 1) * num_pixels - 1) // grid_size
    reach = np.arange((last - first).max() + 1)
    pixels = np.minimum(first[:, None] + reach, last[:, None])
    touched = bits.take(pixels, axis=axis)
    bits = np.bitwise_or.reduce(touched, axis=axis + 1)
  return bits


def mirrored_bits(bits: np.ndarray) -> np.ndarray:
  """Returns the region bits of mirrored pictures, uint16 (..., h, w)."""
  mirrored = np.zeros_like(bits)
  for code, new_code in enumerate(MIRRORED):
    mirrored |= ((bits >> np.uint16(code)) & np.uint16(1)) << np.uint16(
      new_code
    )
  return mirrored[..., ::-1]


def compress_parsing(label_maps: np.ndarray) -> bytes:
  """Compresses label maps, uint8 (T, 224, 224); see `decode_parsing`."""
  import zstandard

  return zstandard.ZstdCompressor(level=3).compress(
    np.ascontiguousarray(label_maps, dtype=np.uint8).tobytes()
  )


def decode_parsing(record: Record) -> np.ndarray:
  """Returns the record's label maps, uint8 (T, 224, 224).

  Raises:
    ValueError: there are none, they are damaged, or they have another size.
  """
  import zstandard

  shape = (len(record), FRAME_SIZE, FRAME_SIZE)
  size = int(np.prod(shape))
  try:
    # Joined records have several zstd frames.
    raw = (
      zstandard.ZstdDecompressor()
      .stream_reader(record.parsing, read_across_frames=True)
      .read(size + 1)
    )
  except zstandard.ZstdError as e:
    raise ValueError(
      f"record {record.name}: its label maps, {len(record.parsing)} bytes, "
      f"cannot be decompressed ({e}); prepare the data set again"
    ) from e
  if len(raw) != size:
    raise ValueError(
      f"record {record.name}: label maps hold {len(raw)} bytes, "
      f"expected {size} for {shape}; prepare the data set again"
    )
  return np.frombuffer(raw, np.uint8).reshape(shape)


def decode_frames(
  record: Record,
  indices: Iterable[int],
  out: np.ndarray | None = None,
  box: Box = WHOLE,
) -> np.ndarray:
  """Decodes chosen frames, or a part of each, at the size of `out`.

  Pictures are antialiased when they are scaled down. To half the size or less,
  JPEG files are decoded from fewer of their frequencies, which is faster.

  Args:
    record: record that holds the frames.
    indices: N frame numbers in [0, T); a repeated number is decoded once.
    out: contiguous uint8 (N, S, S, 3) to write to, S at most 224; None for a
      new array of 224 pixels.
    box: part of each frame to decode, in pixels of FRAME_SIZE; by default all.

  Returns:
    uint8 (N, S, S, 3), RGB; scaled up if the frames are stored smaller.

  Raises:
    ValueError: a frame is not a JPEG of the size of the record's first, or that
      has none of STORED_SIZES; names record and frame.
  """
  indices = list(indices)
  if out is None:
    out = np.empty((len(indices), FRAME_SIZE, FRAME_SIZE, 3), np.uint8)
  stored = record.stored_size
  decode_frame = _frame_decoder(stored, out.shape[1], box)
  first_at: dict[int, int] = {}
  for i, index in enumerate(indices):
    if index in first_at:
      out[i] = out[first_at[index]]
      continue
    first_at[index] = i
    try:
      decode_frame(record.frames[index], out[i])
    except ValueError as e:
      raise ValueError(
        f"record {record.name}: frame {index} is not a "
        f"{stored}x{stored} JPEG ({e}); prepare the data set again"
      ) from e
  return out


@functools.lru_cache(maxsize=1024)
def _frame_decoder(
  stored: int, size: int, box: Box
) -> Callable[[bytes, np.ndarray], None]:
  """Returns a function that decodes a JPEG file into uint8 (S, S, 3).

  The function raises ValueError if the file has another size than `stored`.
  """
  import simplejpeg

  shown = min(box.width, box.height) * stored / FRAME_SIZE
  # libjpeg is slower at other factors than at full size.
  factor = max(n for n in (1, 2, 4, 8) if n == 1 or n * size <= shown)
  decoded_size = stored // factor
  fits = decoded_size == size and box == WHOLE
  corners = (box.x, box.y, box.x + box.width, box.y + box.height)
  part = tuple(x * stored / FRAME_SIZE / factor for x in corners)

  def decode(data: bytes, out: np.ndarray) -> None:
    if factor == 1:  # the header need not be read twice
      pixels = simplejpeg.decode_jpeg(data, buffer=out if fits else None)
      height, width, _ = pixels.shape
    else:
      height, width, *_ = simplejpeg.decode_jpeg_header(data)
    if (height, width) != (stored, stored):
      raise ValueError(f"it has {width}x{height} pixels")
    if factor > 1:
      pixels = simplejpeg.decode_jpeg(
        data,
        min_height=decoded_size,
        min_width=decoded_size,
        buffer=out if fits else None,
      )
    if not fits:
      out[:] = resized(pixels, size, part)

  return decode


def resized(
  pixels: np.ndarray, size: int, box: tuple[float, ...] | None = None
) -> np.ndarray:
  """Scales a picture, or a part of it, to a square; antialiased.

  Args:
    pixels: uint8 (H, W, 3).
    size: S.
    box: x0, y0, x1, y1 of the part in pixels; None: all.

  Returns:
    uint8 (S, S, 3); a picture of that size is returned as it is.
  """
  from PIL import Image

  if box is None and pixels.shape[:2] == (size, size):
    return pixels

  # The filter of Pillow that is nearest to libjpeg's scaling by a half.
  bicubic = Image.Resampling.BICUBIC
  return np.asarray(
    Image.fromarray(pixels).resize((size, size), bicubic, box=box)
  )


# --- tf.train.Example ---------------------------------------------------------


# tensorflow/core/example/*.proto, which is public and frozen, as a
# FileDescriptorProto.
_EXAMPLE_PROTO = """
  name: "marlin_jax/example.proto" package: "tensorflow" syntax: "proto3"
  message_type {
    name: "BytesList"
    field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES }
  }
  message_type {
    name: "FloatList"
    field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT }
  }
  message_type {
    name: "Int64List"
    field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 }
  }
  message_type {
    name: "Feature"
    oneof_decl { name: "kind" }
    field { name: "bytes_list" number: 1 oneof_index: 0 label: LABEL_OPTIONAL
            type: TYPE_MESSAGE type_name: ".tensorflow.BytesList" }
    field { name: "float_list" number: 2 oneof_index: 0 label: LABEL_OPTIONAL
            type: TYPE_MESSAGE type_name: ".tensorflow.FloatList" }
    field { name: "int64_list" number: 3 oneof_index: 0 label: LABEL_OPTIONAL
            type: TYPE_MESSAGE type_name: ".tensorflow.Int64List" }
  }
  message_type {
    name: "Features"
    field { name: "feature" number: 1 label: LABEL_REPEATED
            type: TYPE_MESSAGE type_name: ".tensorflow.Features.FeatureEntry" }
    nested_type {
      name: "FeatureEntry"
      options { map_entry: true }
      field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
      field { name: "value" number: 2 label: LABEL_OPTIONAL
              type: TYPE_MESSAGE type_name: ".tensorflow.Feature" }
    }
  }
  message_type {
    name: "Example"
    field { name: "features" number: 1 label: LABEL_OPTIONAL
            type: TYPE_MESSAGE type_name: ".tensorflow.Features" }
  }
"""


def _message_classes() -> dict[str, type[message.Message]]:
  """Returns the message classes by name, from a private pool.

  The private pool avoids a clash with TensorFlow or TFDS in the same process.
  """
  pool = descriptor_pool.DescriptorPool()
  file = descriptor_pb2.FileDescriptorProto()
  pool.Add(text_format.Parse(_EXAMPLE_PROTO, file))
  names = [message_type.name for message_type in file.message_type]
  return {
    name: message_factory.GetMessageClass(
      pool.FindMessageTypeByName(f"{file.package}.{name}")
    )
    for name in (*names, "Features.FeatureEntry")
  }


# All of them, not Example alone: protobuf makes the class of a nested message
# on first use and keeps no reference to it. The garbage collector then takes
# the class, from under a thread that decodes a record with it meanwhile.
_MESSAGES = _message_classes()
_Example = _MESSAGES["Example"]


def encode(record: Record) -> bytes:
  """Serializes a record; equal records give equal bytes.

  Raises:
    ValueError: the shapes of the record's parts do not agree.
  """
  t = len(record)
  expected = {
    "regions": (t, GRID_SIZE, GRID_SIZE),
    "boxes": (t, 4),
    "quality_terms": (len(QUALITY_TERMS),),
    "mel": (len(record.mel), NUM_MELS),
  }
  for name, shape in expected.items():
    if getattr(record, name).shape != shape:
      raise ValueError(
        f"record {record.name}: {name} has shape "
        f"{getattr(record, name).shape}, expected {shape} for {t} frames"
      )
  example = _Example()
  feature = example.features.feature
  feature["frames"].bytes_list.value.extend(record.frames)
  feature["regions"].bytes_list.value.append(
    record.regions.astype("<u2").tobytes()
  )
  feature["parsing"].bytes_list.value.append(record.parsing)
  feature["boxes"].bytes_list.value.append(record.boxes.astype("<f4").tobytes())
  for name in ("video_id", "subject_id"):
    feature[name].bytes_list.value.append(getattr(record, name).encode())
  for name in ("track_id", "segment"):
    feature[name].int64_list.value.append(getattr(record, name))
  for name in ("fps", "start_secs", "quality"):
    feature[name].float_list.value.append(getattr(record, name))
  feature["quality_terms"].float_list.value.extend(record.quality_terms)
  for name, values in record.labels.items():
    feature[_LABEL + name].float_list.value.extend(values)
  if record.audio is not None:
    feature["audio"].bytes_list.value.append(record.audio)
    feature["mel"].bytes_list.value.append(record.mel.astype("<f4").tobytes())
  return example.SerializeToString(deterministic=True)


def decode(data: bytes) -> Record:
  """Parses a record; frames and label maps stay compressed.

  Raises:
    ValueError: the bytes are not a record; names the wrong feature.
  """
  try:
    feature = _Example.FromString(data).features.feature
  except Exception as e:  # DecodeError is private to protobuf
    raise ValueError(f"not a tf.train.Example of {len(data)} bytes: {e}") from e

  def single(name: str, kind: str):
    values = getattr(feature[name], kind).value if name in feature else ()
    if len(values) != 1:
      raise ValueError(
        f"record feature '{name}' holds {len(values)} values in {kind}, "
        f"expected 1; features present: {sorted(feature)}"
      )
    return values[0]

  # Not a list: a frame is copied out of the message when it is read.
  frames = feature["frames"].bytes_list.value

  def array(name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    raw = single(name, "bytes_list")
    expected = math.prod(shape) * np.dtype(dtype).itemsize
    if len(raw) != expected or not frames:
      raise ValueError(
        f"record feature '{name}' holds {len(raw)} bytes, expected {expected} "
        f"({dtype} {shape} for {len(frames)} frames)"
      )
    return np.frombuffer(raw, dtype).reshape(shape)

  def floats(name: str) -> np.ndarray:
    return np.array(feature[name].float_list.value, np.float32)

  t = len(frames)
  audio, mel = None, np.zeros((0, NUM_MELS), np.float32)
  if "audio" in feature:
    audio = single("audio", "bytes_list")
    num_rows = len(single("mel", "bytes_list")) // (NUM_MELS * mel.itemsize)
    mel = array("mel", "<f4", (num_rows, NUM_MELS))
  return Record(
    frames=frames,
    regions=array("regions", "<u2", (t, GRID_SIZE, GRID_SIZE)),
    parsing=single("parsing", "bytes_list"),
    boxes=array("boxes", "<f4", (t, 4)),
    video_id=single("video_id", "bytes_list").decode(),
    track_id=single("track_id", "int64_list"),
    segment=single("segment", "int64_list"),
    subject_id=single("subject_id", "bytes_list").decode(),
    fps=single("fps", "float_list"),
    start_secs=single("start_secs", "float_list"),
    quality=single("quality", "float_list"),
    quality_terms=floats("quality_terms"),
    labels={
      name.removeprefix(_LABEL): floats(name)
      for name in sorted(feature)
      if name.startswith(_LABEL)
    },
    audio=audio,
    mel=mel,
  )
