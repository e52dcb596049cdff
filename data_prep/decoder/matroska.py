"""Finds damage to a Matroska file itself, which libav skips without a word.

The file is standard input. It is a tree of EBML elements (RFC 8794), each a
name, a size and its content; those of Matroska are in RFC 9559.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator

from data_prep.decoder.protocol import Damaged


def before_damage(packets: Iterator, container) -> Iterator:
  """Yields the packets before damage to a Matroska file itself.

  libav skips it without a word. Decoders such as that of VP8 do not notice that
  the frames are missing to which others refer.

  Args:
    packets: the packets, read from the beginning of standard input.
    container: the file.

  Raises:
    Damaged: at the end of these packets, if the file is damaged.
  """
  end = math.inf
  if container.format.name.startswith("matroska"):
    end = _end_of_matroska(os.fstat(0).st_size)
  for packet in packets:
    if packet.pos is not None and packet.pos >= end:
      break
    yield packet
  if end < math.inf:
    raise Damaged(f"the file is damaged behind byte {end}")


# Elements that a file may be cut in: a block, a group of them, padding, and
# SeekHead, Info, Tracks, Cues, Attachments, Chapters and Tags.
_LONG = (
  *(b"\xa3", b"\xa0", b"\xec", b"\x11M\x9bt", b"\x15I\xa9f", b"\x16T\xaek"),
  *(b"\x1cS\xbbk", b"\x19A\xa4i", b"\x10C\xa7p", b"\x12T\xc3g"),
)
# Bytes of name and size.
_MAX_HEADER = 12
_EBML, _SEGMENT, _CLUSTER = b"\x1aE\xdf\xa3", b"\x18S\x80g", b"\x1fC\xb6u"


def _end_of_matroska(size: int) -> float:
  """Returns the last element before bytes that are none of Matroska's.

  The damage may begin within that element.

  Args:
    size: bytes of the file, which is standard input.

  Returns:
    Its first byte. inf if there are no such bytes, also where the file was cut,
    or something was appended.
  """
  at = last = 0
  segment_end = cluster_end = math.inf
  while at + _MAX_HEADER < size:
    name, start, end = _element(at)
    if name == _SEGMENT:
      at, segment_end, cluster_end = start, end, start
      continue
    if name == _CLUSTER:
      at, cluster_end = start, end
      continue
    most = cluster_end if at < cluster_end else segment_end
    if name == _EBML:
      most = math.inf
    elif at >= segment_end:
      return math.inf
    if name not in _LONG:
      most = min(most, size)
    if end > most or end == math.inf:
      return last
    at, last = int(end), at
  return math.inf


def _element(at: int) -> tuple[bytes, int, float]:
  """Returns name, first byte of the content, and end of an EBML element.

  The end is inf if the size is unknown, or if there is no element.
  """
  data = os.pread(0, _MAX_HEADER, at)
  # The number of leading zeros tells the number of bytes.
  name_bytes, num_bytes = 9 - data[0].bit_length(), 0
  if name_bytes <= 4:
    num_bytes = 9 - data[name_bytes].bit_length()
  start = at + name_bytes + num_bytes
  if not 0 < num_bytes <= 8:
    return b"", at + 1, math.inf
  bits = 7 * num_bytes
  size = int.from_bytes(data[name_bytes : name_bytes + num_bytes], "big")
  size &= (1 << bits) - 1
  is_unknown = size == (1 << bits) - 1
  return data[:name_bytes], start, math.inf if is_unknown else start + size
