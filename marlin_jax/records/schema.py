"""The one record schema: bytes <-> numpy, shared with data_prep.

A record is one segment of one face track: at most a few dozen consecutive
224x224 face crops with what the trainer needs beside them. On disk it is a
`tf.train.Example` inside an ArrayRecord shard of a TFDS data set directory, so
that `tfds.builder_from_directory(...)` reads it too. Here it is parsed without
TensorFlow or TFDS, and frames are decoded only where they are asked for.

Axes: T frames, H W pixels (224), h w patches (14).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from google.protobuf import (
  descriptor_pb2,
  descriptor_pool,
  message_factory,
)

# Raised whenever the meaning of a feature changes; kept in metadata.json.
SCHEMA_VERSION = 2

FRAME_SIZE = 224
PATCH_SIZE = 16
GRID_SIZE = FRAME_SIZE // PATCH_SIZE

# LaPa's classes (Liu et al., "A New Dataset and Boundary-Attention Semantic
# Segmentation for Face Parsing", AAAI 2020); the position is the label code.
# Left and right are the person's own.
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

# Terms of a track's quality, each in [0, 1]; see data_prep.faces.quality.
QUALITY_TERMS = ("size", "sharpness", "pose", "landmarks")

# The clip of the paper: 16 frames, every second one. It spans 31 frames of a
# record, from its first frame to its last.
CLIP_FRAMES, CLIP_STRIDE = 16, 2
CLIP_SPAN = (CLIP_FRAMES - 1) * CLIP_STRIDE + 1

SAMPLE_RATE = 16_000
NUM_MELS = 80

_LABEL = "label_"


@dataclasses.dataclass(frozen=True)
class Record:
  """One track segment.

  Attributes:
    frames: T JPEG files, RGB 224x224, quality 95.
    regions: uint16 (T, 14, 14); bit k is set where LaPa class k touches the
      patch; all zero in a frame in which no face was parsed.
    parsing: zstd-compressed uint8 (T, 224, 224) of LaPa label codes.
    boxes: float32 (T, 4), the crop as x0, y0, x1, y1 in source pixels; it may
      reach past the frame, where the crop is black.
    video_id: path of the source relative to its root, unique in the data set.
    track_id: number of the face track within the video.
    segment: number of this segment within the track.
    subject_id: identity of the person where known, else ''.
    fps: frames per second of the source.
    start_secs: time of the first frame in the source, in seconds.
    quality: score of the track in [0, 1]; higher is better.
    quality_terms: float32 (4,), what it is made of, as QUALITY_TERMS.
    labels: what is known of the video, by name: float32 (K,), NaN where it is
      not known. `labels` in metadata.json says what the numbers mean.
    audio: sound of the segment, 16-bit little-endian PCM, 16 kHz, mono; empty
      where the video has none, None in a data set without sound.
    mel: float32 (N, 80), the sound's log-mel spectrogram, 80 rows a second;
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
    """Unique within the data set, for logs and errors."""
    return f"{self.video_id}#{self.track_id}.{self.segment}"


def region_bits(label_maps: np.ndarray) -> np.ndarray:
  """Says which regions touch each patch.

  Args:
    label_maps: uint8 (T, H, W) of LaPa codes; H and W are multiples of 16.

  Returns:
    uint16 (T, H/16, W/16); bit k is set where any pixel of the patch has
    code k.
  """
  t, height, width = label_maps.shape
  grid = (t, height // PATCH_SIZE, PATCH_SIZE, width // PATCH_SIZE, PATCH_SIZE)
  bits = np.left_shift(np.uint16(1), label_maps, dtype=np.uint16)
  return np.bitwise_or.reduce(bits.reshape(grid), axis=(2, 4))


def compress_parsing(label_maps: np.ndarray) -> bytes:
  """Packs uint8 (T, 224, 224) label maps; `decode_parsing` is the inverse."""
  import zstandard

  return zstandard.ZstdCompressor(level=3).compress(
    np.ascontiguousarray(label_maps, dtype=np.uint8).tobytes()
  )


def decode_parsing(record: Record) -> np.ndarray:
  """Returns the record's label maps, uint8 (T, 224, 224)."""
  import zstandard

  shape = (len(record), FRAME_SIZE, FRAME_SIZE)
  size = int(np.prod(shape))
  raw = zstandard.ZstdDecompressor().decompress(
    record.parsing, max_output_size=size
  )
  if len(raw) != size:
    raise ValueError(
      f"record {record.name}: label maps hold {len(raw)} bytes, "
      f"expected {size} for {shape}"
    )
  return np.frombuffer(raw, np.uint8).reshape(shape)


def decode_frames(
  record: Record, indices: Iterable[int], out: np.ndarray | None = None
) -> np.ndarray:
  """Decodes the chosen frames.

  Args:
    record: the record.
    indices: frame numbers in [0, T); a repeated number is decoded once.
    out: where to, uint8 (len(indices), 224, 224, 3), in one piece of memory; a
      new array where None.

  Returns:
    uint8 (len(indices), 224, 224, 3), RGB.

  Raises:
    ValueError: a frame is no JPEG of 224x224; names record and frame.
  """
  import simplejpeg

  indices = list(indices)
  shape = (FRAME_SIZE, FRAME_SIZE, 3)
  if out is None:
    out = np.empty((len(indices), *shape), np.uint8)
  first_at: dict[int, int] = {}
  for i, index in enumerate(indices):
    if index in first_at:
      out[i] = out[first_at[index]]
      continue
    first_at[index] = i
    try:
      frame = simplejpeg.decode_jpeg(record.frames[index], buffer=out[i])
    except ValueError as e:
      raise ValueError(
        f"record {record.name}: frame {index} is not a "
        f"{FRAME_SIZE}x{FRAME_SIZE} JPEG ({e}); prepare the data set again"
      ) from e
    if frame.shape != shape:
      raise ValueError(
        f"record {record.name}: frame {index} has shape {frame.shape}, "
        f"expected {shape}; prepare the data set again"
      )
  return out


# --- tf.train.Example ---------------------------------------------------------


def _example_class():
  """Builds `tf.train.Example` in a pool of its own.

  The message is public and frozen (tensorflow/core/example/*.proto). A private
  pool keeps it from clashing with TensorFlow or TFDS in the same process, and
  protobuf's C parser reads it as fast as theirs.
  """
  field = descriptor_pb2.FieldDescriptorProto
  file = descriptor_pb2.FileDescriptorProto(
    name="marlin_jax/example.proto", package="tensorflow", syntax="proto3"
  )

  def add(message, name, number, kind, *, repeated=False, of=None, oneof=None):
    message.field.add(
      name=name,
      number=number,
      type=kind,
      label=field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL,
      type_name=of,
      oneof_index=oneof,
    )

  kinds = (
    ("BytesList", "bytes_list", field.TYPE_BYTES),
    ("FloatList", "float_list", field.TYPE_FLOAT),
    ("Int64List", "int64_list", field.TYPE_INT64),
  )
  for list_name, _, kind in kinds:
    add(file.message_type.add(name=list_name), "value", 1, kind, repeated=True)
  feature = file.message_type.add(name="Feature")
  feature.oneof_decl.add(name="kind")
  for number, (list_name, field_name, _) in enumerate(kinds, 1):
    add(
      feature,
      field_name,
      number,
      field.TYPE_MESSAGE,
      of=f".tensorflow.{list_name}",
      oneof=0,
    )
  features = file.message_type.add(name="Features")
  entry = features.nested_type.add(name="FeatureEntry")
  entry.options.map_entry = True
  add(entry, "key", 1, field.TYPE_STRING)
  add(entry, "value", 2, field.TYPE_MESSAGE, of=".tensorflow.Feature")
  add(
    features,
    "feature",
    1,
    field.TYPE_MESSAGE,
    repeated=True,
    of=".tensorflow.Features.FeatureEntry",
  )
  example = file.message_type.add(name="Example")
  add(example, "features", 1, field.TYPE_MESSAGE, of=".tensorflow.Features")

  pool = descriptor_pool.DescriptorPool()
  pool.Add(file)
  return message_factory.GetMessageClass(
    pool.FindMessageTypeByName("tensorflow.Example")
  )


_Example = _example_class()


def encode(record: Record) -> bytes:
  """Serialises a record; the same record gives the same bytes.

  Raises:
    ValueError: shapes of the record's parts do not agree.
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
    ValueError: the bytes are no such record; says which feature is wrong.
  """
  try:
    feature = _Example.FromString(data).features.feature
  except Exception as e:  # protobuf's DecodeError is no public class of ours
    raise ValueError(f"not a tf.train.Example of {len(data)} bytes: {e}") from e

  def one(name: str, kind: str):
    found = feature.get(name)
    values = getattr(found, kind).value if found else ()
    if len(values) != 1:
      raise ValueError(
        f"record feature '{name}' holds {len(values)} values in {kind}, "
        f"expected 1; features found: {sorted(feature)}"
      )
    return values[0]

  # Not a list: a frame is copied out of the message when it is asked for.
  frames = feature["frames"].bytes_list.value

  def array(name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    raw = one(name, "bytes_list")
    found, expected = len(raw), math.prod(shape) * np.dtype(dtype).itemsize
    if found != expected or not frames:
      raise ValueError(
        f"record feature '{name}' holds {found} bytes, expected {expected} "
        f"({dtype} {shape} for {len(frames)} frames)"
      )
    return np.frombuffer(raw, dtype).reshape(shape)

  def floats(name: str) -> np.ndarray:
    return np.array(feature[name].float_list.value, np.float32)

  t = len(frames)
  audio, mel = None, np.zeros((0, NUM_MELS), np.float32)
  if "audio" in feature:
    audio = one("audio", "bytes_list")
    num_rows = len(one("mel", "bytes_list")) // (NUM_MELS * mel.itemsize)
    mel = array("mel", "<f4", (num_rows, NUM_MELS))
  return Record(
    frames=frames,
    regions=array("regions", "<u2", (t, GRID_SIZE, GRID_SIZE)),
    parsing=one("parsing", "bytes_list"),
    boxes=array("boxes", "<f4", (t, 4)),
    video_id=one("video_id", "bytes_list").decode(),
    track_id=one("track_id", "int64_list"),
    segment=one("segment", "int64_list"),
    subject_id=one("subject_id", "bytes_list").decode(),
    fps=one("fps", "float_list"),
    start_secs=one("start_secs", "float_list"),
    quality=one("quality", "float_list"),
    quality_terms=floats("quality_terms"),
    labels={
      name.removeprefix(_LABEL): floats(name)
      for name in sorted(feature)
      if name.startswith(_LABEL)
    },
    audio=audio,
    mel=mel,
  )
