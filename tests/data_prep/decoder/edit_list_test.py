"""MP4 files whose edit lists show parts of what they hold."""

import struct
from pathlib import Path

import numpy as np
import pytest

from data_prep.decoder.protocol import WHOLE, Span
from data_prep.video.decode import open_video
from tests.support.videos import write_video

RATE = 30
NUM_FRAMES = 90
# The level of a frame tells its number.
FRAMES = [np.full((48, 64, 3), 20 + 2 * i, np.uint8) for i in range(NUM_FRAMES)]
EMPTY = -1.0


def with_edits(path: Path, *edits: tuple[float, float]) -> Path:
  """Rewrites the edit list of an MP4 file of one track.

  Args:
    path: the file, whose index comes last.
    *edits: length in seconds, and start in the media, which may be EMPTY.
  """
  data = bytearray(path.read_bytes())

  def word(box: bytes, offset: int) -> int:
    return struct.unpack_from(">I", data, data.index(box) + offset)[0]

  units, media_units = word(b"mvhd", 16), word(b"mdhd", 16)
  delay = word(b"elst", 16)  # of the first frame, since B-frames follow it
  entries = b"".join(
    struct.pack(
      ">IiI",
      round(secs * units),
      -1 if start == EMPTY else round(start * media_units) + delay,
      0x10000,
    )
    for secs, start in edits
  )
  elst = struct.pack(">I4sII", 16 + len(entries), b"elst", 0, len(edits))
  box = struct.pack(">I4s", 8 + len(elst + entries), b"edts") + elst + entries
  at, size = data.index(b"edts") - 4, word(b"edts", -4)
  for outer in (b"moov", b"trak"):
    new_size = word(outer, -4) + len(box) - size
    struct.pack_into(">I", data, data.index(outer) - 4, new_size)
  data[at : at + size] = box
  path.write_bytes(data)
  return path


@pytest.fixture
def path(tmp_path) -> Path:
  return write_video(tmp_path / "v.mp4", FRAMES, bf="2", g="15")


def read(path: Path, span: Span = WHOLE):
  """Returns the numbers of the frames, their times, notes and the rate."""
  with open_video(path, span=span) as video:
    frames, secs = zip(*video, strict=True)
    numbers = [round((f.mean() - 20) / 2) for f in frames]
    return numbers, np.array(secs), video.notes, video.fps


@pytest.mark.parametrize(
  ("edits", "shown"),
  [
    ([(1, 1)], [range(30, 60)]),
    ([(0.5, EMPTY), (1, 1)], [range(30, 60)]),
    ([(10, EMPTY), (1, 1)], [range(30, 60)]),
    ([(0.5, 0.5), (0.5, 2)], [range(15, 30), range(60, 75)]),
    ([(0.5, 2), (0.5, 0.5)], [range(60, 75), range(15, 30)]),
    ([(0.5, 0.5), (0.5, 0.5)], [range(15, 30), range(15, 30)]),
  ],
  ids=["middle", "late", "later", "two", "back", "repeated"],
)
def test_frames_have_the_times_that_edits_give_them(path, edits, shown):
  numbers, secs, notes, fps = read(with_edits(path, *edits))
  expected = [number for part in shown for number in part]
  assert len(numbers) == len(expected)
  # Encoding may change a level a little.
  np.testing.assert_allclose(numbers, expected, atol=1)
  np.testing.assert_allclose(secs, np.arange(len(numbers)) / RATE, atol=2e-3)
  assert notes == []
  assert fps == pytest.approx(RATE, rel=0.01)


def test_a_span_of_edits_is_that_of_the_whole(path):
  with_edits(path, (0.75, 0.25), (0.8, 1.75))
  numbers, secs, _, _ = read(path)
  for span in (Span(0.3, 0.6), Span(0.9, 1.3), Span(1.3, 1.5)):
    is_in = (secs >= span.start - 1e-3) & (secs < span.end - 1e-3)
    assert read(path, span)[0] == [*np.array(numbers)[is_in]]


def test_frames_that_were_dropped_are_left_out_and_told(tmp_path):
  """Cameras and converters leave samples of no bytes for dropped frames."""
  path = write_video(tmp_path / "v.mp4", FRAMES, "mpeg4", "yuv420p", g="1")
  data = bytearray(path.read_bytes())
  sizes = data.index(b"stsz") + 16
  # Every third frame; its bytes follow those of the frame before, unread.
  for at in range(sizes + 4 * 2, sizes + 4 * NUM_FRAMES, 12):
    before, size = struct.unpack_from(">II", data, at - 4)
    struct.pack_into(">II", data, at - 4, before + size, 0)
  path.write_bytes(data)
  numbers, secs, notes, _ = read(path)
  np.testing.assert_allclose(numbers, np.delete(range(90), np.s_[2::3]), atol=2)
  np.testing.assert_allclose(
    secs, np.delete(np.arange(90) / RATE, np.s_[2::3]), atol=2e-3
  )
  assert notes == ["frames are missing: 60 of 90 announced"]
