"""Decodes a folder whose pictures are the frames of a video.

The last numbers in their names are those of the frames: a missing number is a
pause.

The decoder may open no file, so another process opens them: `start_reader`
forks one, which decodes nothing and sends their bytes through a pipe.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import struct
from collections.abc import Iterator
from pathlib import PurePath

from data_prep.decoder import packets, pixels, protocol, sandbox
from data_prep.decoder.protocol import Damaged, Limits, Refused, send

# Suffixes of pictures, and their codecs.
PICTURES = {".jpg": "mjpeg", ".jpeg": "mjpeg", ".png": "png"}
MAX_PICTURE_BYTES = 256 << 20

_COUNT = struct.Struct("<I")
# Bytes of the name and of the picture.
_SIZES = struct.Struct("<IQ")
_UNREADABLE = MAX_PICTURE_BYTES + 1


def start_reader(pipe: int) -> None:
  """Replaces standard input, a folder, by a pipe of all of its pictures.

  Args:
    pipe: file descriptor that the reading process must not keep open.
  """
  pictures, output = os.pipe()
  if os.fork() == 0:
    sandbox.end_with_parent()
    try:
      os.close(pictures)
      os.close(pipe)
      with open(output, "wb") as file:
        _read_pictures(0, file)
    finally:
      os._exit(0)
  os.close(output)
  os.dup2(pictures, 0)
  os.close(pictures)


def _read_pictures(folder: int, output: io.BufferedWriter) -> None:
  """Writes the names and bytes of all pictures of a folder."""
  # No symbolic links: they may lead anywhere.
  names = [
    entry.name
    for entry in os.scandir(folder)
    if entry.is_file(follow_symlinks=False)
    and PurePath(entry.name).suffix.lower() in PICTURES
  ]
  # By the numbers in the names: 0.10.jpg comes after 0.9.jpg.
  names.sort(
    key=lambda name: ([int(n) for n in re.findall("[0-9]+", name)], name)
  )
  output.write(_COUNT.pack(len(names)))
  for name in names:
    encoded = os.fsencode(name)
    try:
      file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=folder)
      with open(file, "rb") as picture:
        data = picture.read(MAX_PICTURE_BYTES + 1)
    except OSError:
      output.write(_SIZES.pack(len(encoded), _UNREADABLE) + encoded)
      return
    output.write(_SIZES.pack(len(encoded), len(data)) + encoded)
    if len(data) > MAX_PICTURE_BYTES:
      return
    output.write(data)


def decode(frame_rate: float, limits: Limits, pipe: int) -> None:
  """Writes the pictures that `start_reader` sends to the pipe, as a video.

  Raises:
    Refused: the pictures differ in size, or a limit is exceeded.
    Damaged: a picture is damaged.
  """
  import av

  av.logging.set_level(None)
  converter = pixels.RgbConverter()
  decoders = {codec: _decoder(codec, limits) for codec in PICTURES.values()}
  size = 0, 0
  with open(0, "rb", closefd=False) as file:
    (num_pictures,) = _COUNT.unpack(file.read(_COUNT.size))
    numbers = _Numbers()
    for i, (name, data) in enumerate(_pictures(file, num_pictures)):
      try:
        codec = PICTURES[PurePath(name).suffix.lower()]
        (frame,) = decoders[codec].decode(av.Packet(data))
      except (av.FFmpegError, ValueError) as e:
        if isinstance(e, MemoryError):
          raise
        _check_size(data, codec, limits)
        raise Damaged(f"picture {name} is damaged: {e}") from e
      if i == 0:
        size = frame.width, frame.height
        if num_pictures > protocol.most_frames(*size, limits):
          raise Refused(protocol.too_many_frames(*size, limits))
        info = {"width": frame.width, "height": frame.height}
        orientation = pixels.orientation(frame, data)
        info |= {"orientation": orientation, "rate": frame_rate}
        info |= {"announced_frames": num_pictures}
        send(pipe, b"I", json.dumps(info).encode())
      elif (frame.width, frame.height) != size:
        raise Refused(
          f"picture {name} is {frame.width}x{frame.height}, the first is "
          f"{size[0]}x{size[1]}"
        )
      pixels.send_frame(pipe, converter(frame), numbers.next(name) / frame_rate)
  if not num_pictures:
    raise Refused(f"no picture in the folder (by suffix: {' '.join(PICTURES)})")
  send(pipe, b"E")


def _decoder(codec: str, limits: Limits):
  """Returns a decoder for all pictures of a folder.

  It allocates no picture over the limit. To open each picture as a container
  would take as long as to decode it.
  """
  import av

  decoder = av.CodecContext.create(codec, "r")
  decoder.options = {
    "err_detect": "explode",
    "max_pixels": str(limits.frame_pixels),
  }
  decoder.thread_count = 1
  return decoder


def _check_size(data: bytes, codec: str, limits: Limits) -> None:
  """Refuses a picture over the limit, which no decoder has taken."""
  import av

  demuxer = {"mjpeg": "jpeg_pipe", "png": "png_pipe"}[codec]
  with (
    contextlib.suppress(av.FFmpegError),
    packets.av_open(io.BytesIO(data), format=demuxer) as container,
  ):
    stream = container.streams.video[0]
    if reason := protocol.too_large(stream.width, stream.height, limits):
      raise Refused(reason)


class _Numbers:
  """Numbers of frames from 0 on, from the names of their pictures."""

  def __init__(self) -> None:
    self._last: tuple[int, int] | None = None

  def next(self, name: str) -> int:
    """Returns the number of the next frame.

    It is the next one also where the name has no number, or none that ascends.
    """
    written = re.findall("[0-9]+", PurePath(name).stem)[-1:]
    at = int(written[0]) if written else -1
    number = 0
    if self._last is not None:
      last, last_at = self._last
      number = last + (at - last_at if at > last_at >= 0 else 1)
    self._last = number, at
    return number


def _pictures(
  file: io.BufferedReader, num_pictures: int
) -> Iterator[tuple[str, bytes]]:
  """Yields names and bytes."""
  for _ in range(num_pictures):
    name_bytes, num_bytes = _SIZES.unpack(file.read(_SIZES.size))
    name = os.fsdecode(file.read(name_bytes))
    if num_bytes == _UNREADABLE:
      raise Refused(
        f"picture {name} cannot be read, or is over {MAX_PICTURE_BYTES >> 20} "
        "MiB"
      )
    yield name, file.read(num_bytes)
