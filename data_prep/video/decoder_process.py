"""Program that writes the raw pixels or sound of one video to a pipe.

`data_prep.video.decode` starts it and reads the pipe. A video may be hostile,
and the libraries that read it are large C programs; here they run with limits
on memory, CPU time and file writing. The program imports nothing of this
package, so that it starts from its file alone.

A message is a kind (one byte), a length, and so many bytes:
  I  JSON: width, height (as stored), rotation, rate, announced_frames; once,
     first
  F  time in seconds, bytes per row, rows of RGB; once per frame
  T  JSON: rate, num_channels; once, before original sound
  S  16-bit little-endian samples, channels interleaved; many
  E  nothing: the video has ended; last
  X  why the video is refused; last
  N  why no video can be decoded on this machine; last
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import json
import math
import os
import re
import resource
import signal
import struct
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

# Demuxers of self-contained video files. Playlists (hls, concat, image2, ...)
# are left out: they make the demuxer open further files.
FORMATS = "mov,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,m4v,mjpeg,h264,hevc"
# Demuxers of audio files.
SOUND_FORMATS = "wav,mp3,flac,aac,aiff,caf,au,w64"
# Suffixes of pictures, and their demuxers.
PICTURES = {".jpg": "jpeg_pipe", ".jpeg": "jpeg_pipe", ".png": "png_pipe"}

SAMPLE_RATE = 16_000
# Two hours: 230 MB of samples in the parent.
MAX_SOUND_SECS = 7200

MESSAGE = struct.Struct("<cI")
FRAME = struct.Struct("<dI")
# Decoding is cheaper than finding faces: two threads keep a worker busy, and a
# fixed number makes the use of memory equal on all machines.
_NUM_THREADS = 2
_PR_SET_PDEATHSIG = 1


@dataclasses.dataclass(frozen=True)
class Limits:
  """Limits on what one video may cost.

  Attributes:
    frame_pixels: width x height of one frame; the default allows 4096x2304.
    frames: frames per video; the default is an hour at 30 frames per second.
      Memory holds the face meshes of a whole video, 4 kB per frame.
    video_pixels: pixels of all frames together; the default is an hour of
      1920x1080 at 30 frames per second, which a black video of a few MB may
      have.
    secs: seconds spent waiting for the decoder in one pass; the time the caller
      takes for a frame does not count.
    memory_bytes: address space of the decoder process.
  """

  frame_pixels: int = 4096 * 2304
  frames: int = 108_000
  video_pixels: int = 1920 * 1080 * 108_000
  secs: float = 300.0
  memory_bytes: int = 2 << 30


DEFAULT_LIMITS = Limits()


def most_frames(width: int, height: int, limits: Limits) -> int:
  """Returns the largest number of frames of this size within the limits."""
  return min(limits.frames, limits.video_pixels // (width * height))


def too_many_frames(width: int, height: int, limits: Limits) -> str:
  """Returns the reason for refusing a video of too many frames."""
  most = most_frames(width, height, limits)
  return f"more frames of {width}x{height} than the limit of {most}"


class _Refused(Exception):
  """A video is refused; the message is the reason."""


def _open(path: Path):
  import av

  av.logging.set_level(None)
  options = {
    "err_detect": "explode",
    "protocol_whitelist": "file",
    "format_whitelist": f"{FORMATS},{SOUND_FORMATS}",
  }
  try:
    # Metadata in another encoding is no reason to refuse a video.
    return av.open(f"file:{path}", options=options, metadata_errors="replace")
  except av.FFmpegError as e:
    raise _Refused(f"cannot open: {e.strerror}") from e


def _decode(path: Path, limits: Limits, pipe: int) -> None:
  """Writes the whole video to the pipe.

  Raises:
    _Refused: the video cannot be decoded to its end.
  """
  import av

  with _open(path) as container:
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if not streams:
      raise _Refused("no video stream")
    stream = streams[0]
    if stream.codec_context is None:
      raise _Refused("no decoder is known for its video stream")
    _check_size(stream, limits)
    # By default libav conceals damage and returns the frame as a good one.
    stream.codec_context.options = {"err_detect": "explode"}
    stream.codec_context.thread_count = _NUM_THREADS
    stream.thread_type = "AUTO"
    num_frames = 0
    try:
      for frame in _frames(container, stream):
        if num_frames == 0:
          size = frame.width, frame.height
          _check_pixels(*size, limits)
          _send_info(pipe, frame, stream)
        elif (frame.width, frame.height) != size:
          raise _Refused(
            f"frame size changes from {size[0]}x{size[1]} to "
            f"{frame.width}x{frame.height}"
          )
        if num_frames == most_frames(*size, limits):
          raise _Refused(too_many_frames(*size, limits))
        _send_frame(pipe, frame, container.start_time)
        num_frames += 1
    except av.FFmpegError as e:
      if isinstance(e, MemoryError):
        raise
      raise _Refused(
        f"decoder reported damage after {num_frames} frames: {e.strerror}"
      ) from e
  if num_frames == 0:
    raise _Refused("no frame could be decoded")
  _send(pipe, b"E")


def _decode_sound(path: Path, pipe: int, is_original: bool) -> None:
  """Writes the first sound track to the pipe, nothing where there is none.

  Args:
    path: the file.
    pipe: file descriptor.
    is_original: see `_samples`.

  Raises:
    _Refused: the sound cannot be decoded to its end.
  """
  import av

  with _open(path) as container:
    if container.streams.audio:
      num_sent = 0
      rate = SAMPLE_RATE
      try:
        for samples in _samples(container, is_original):
          num_channels = samples.layout.nb_channels
          if is_original and not num_sent:
            rate = samples.sample_rate
            info = {"rate": rate, "num_channels": num_channels}
            _send(pipe, b"T", json.dumps(info).encode())
          num_sent += samples.samples
          if num_sent > MAX_SOUND_SECS * rate:
            raise _Refused(
              f"more sound than the limit of {MAX_SOUND_SECS} seconds"
            )
          num_bytes = 2 * num_channels * samples.samples
          _send(pipe, b"S", memoryview(samples.planes[0])[:num_bytes])
      except (av.FFmpegError, ValueError) as e:
        if isinstance(e, MemoryError):
          raise
        secs = num_sent / rate
        raise _Refused(
          f"decoder reported damaged sound after {secs:.1f} s: {e}"
        ) from e
  _send(pipe, b"E")


def _samples(container, is_original: bool) -> Iterator:
  """Yields audio frames of 16-bit samples from time 0 on.

  Args:
    container: has a sound track.
    is_original: keep its rate, and two channels where it has two or more; else
      convert to 16 kHz, mono.
  """
  import av

  stream = container.streams.audio[0]
  if stream.codec_context is None:
    raise _Refused("no decoder is known for its sound")
  stream.codec_context.options = {"err_detect": "explode"}
  start = Fraction(container.start_time or 0, 1_000_000)
  resampler = None
  for frame in _frames(container, stream):
    if resampler is None:
      layout = "mono"
      if is_original and frame.layout.nb_channels > 1:
        layout = "stereo"
      # async and first_pts insert silence where the track begins late or has a
      # gap, and cut off samples before the first frame.
      resampler = av.AudioResampler(
        "s16",
        layout,
        frame.sample_rate if is_original else SAMPLE_RATE,
        # Any size: without one, audio frames of this format pass unchanged,
        # whatever their times.
        frame_size=4096,
        options={"async": "1", "first_pts": "0"},
      )
    if frame.pts is not None:
      frame.pts -= round(start / frame.time_base)
    yield from resampler.resample(frame)
  if resampler is not None:
    yield from resampler.resample(None)


def _decode_pictures(
  folder: Path, frame_rate: float, limits: Limits, pipe: int
) -> None:
  """Writes a video, a folder whose pictures are the frames, to the pipe.

  Raises:
    _Refused: a picture is damaged, or a limit is exceeded.
  """
  import av

  av.logging.set_level(None)
  # No symbolic links: they may lead anywhere.
  files = [
    Path(entry.path)
    for entry in os.scandir(folder)
    if entry.is_file(follow_symlinks=False)
    and Path(entry.name).suffix.lower() in PICTURES
  ]
  # By the numbers in the names: 0.10.jpg comes after 0.9.jpg.
  files.sort(
    key=lambda file: ([int(n) for n in re.findall("[0-9]+", file.name)], file)
  )
  size = 0, 0
  for i, file in enumerate(files):
    try:
      with av.open(
        f"file:{file}",
        format=PICTURES[file.suffix.lower()],
        options={"err_detect": "explode", "protocol_whitelist": "file"},
        metadata_errors="replace",
      ) as container:
        stream = container.streams.video[0]
        _check_pixels(stream.width, stream.height, limits)
        stream.codec_context.options = {"err_detect": "explode"}
        (frame,) = container.decode(stream)
    except (av.FFmpegError, ValueError) as e:
      if isinstance(e, MemoryError):
        raise
      raise _Refused(f"picture {file.name} is damaged: {e}") from e
    if i == 0:
      size = frame.width, frame.height
      if len(files) > most_frames(*size, limits):
        raise _Refused(too_many_frames(*size, limits))
      info = {"width": frame.width, "height": frame.height, "rotation": 0}
      info |= {"rate": frame_rate, "announced_frames": len(files)}
      _send(pipe, b"I", json.dumps(info).encode())
    elif (frame.width, frame.height) != size:
      raise _Refused(
        f"picture {file.name} is {frame.width}x{frame.height}, the first is "
        f"{size[0]}x{size[1]}"
      )
    _send_pixels(pipe, frame, i / frame_rate)
  if not files:
    raise _Refused(
      f"no picture in the folder (by suffix: {' '.join(PICTURES)})"
    )
  _send(pipe, b"E")


def _check_size(stream, limits: Limits) -> None:
  """Refuses a video that is too large, before any frame is decoded."""
  _check_pixels(stream.width, stream.height, limits)
  num_frames = _announced_frames(stream)
  if num_frames > most_frames(stream.width, stream.height, limits):
    raise _Refused(
      f"{too_many_frames(stream.width, stream.height, limits)}: the container "
      f"announces {num_frames}"
    )


def _announced_frames(stream) -> int:
  """Returns the number of frames by the container, 0 where it is unknown."""
  if stream.frames or not stream.average_rate:
    return stream.frames
  # Matroska has only the duration of the file, in microseconds.
  duration = (stream.container.duration or 0) / 1_000_000
  if stream.duration:
    duration = stream.duration * stream.time_base
  return int(duration * stream.average_rate)


def _check_pixels(width: int, height: int, limits: Limits) -> None:
  """Refuses frames of an unknown size, or with too many pixels."""
  if not width * height:
    raise _Refused("cannot open: the size of its frames is unknown")
  if width * height > limits.frame_pixels:
    raise _Refused(
      f"frames of {width}x{height} are over the limit of "
      f"{limits.frame_pixels} pixels"
    )


def _frames(container, stream) -> Iterator:
  """Yields the decoded frames of a stream; refuses damaged ones."""
  for packet in container.demux(stream):
    # The container ends, or has a gap, within this packet.
    if packet.is_corrupt:
      raise _Refused("decoder reported damage: a packet is cut off")
    for frame in packet.decode():
      if frame.is_corrupt:
        raise _Refused("decoder reported damage: a frame is incomplete")
      yield frame


def _send_info(pipe: int, frame, stream) -> None:
  rate = stream.average_rate or stream.guessed_rate or 0
  # For a display matrix of zeros PyAV returns the smallest int.
  rotation = frame.rotation if abs(frame.rotation) <= 360 else 0
  info = {
    "width": frame.width,
    "height": frame.height,
    "rotation": rotation,
    "rate": float(rate),
    "announced_frames": _announced_frames(stream),
  }
  _send(pipe, b"I", json.dumps(info).encode())


def _send_frame(pipe: int, frame, start_time: int | None) -> None:
  secs = math.nan
  if frame.time is not None:
    secs = frame.time - (start_time or 0) / 1e6
  _send_pixels(pipe, frame, secs)


@functools.cache
def _converter():
  """Returns a converter to RGB.

  It is cached: a new converter per frame costs as much as decoding.
  """
  from av.video.reformatter import VideoReformatter

  return VideoReformatter()


def _send_pixels(pipe: int, frame, secs: float) -> None:
  rgb = _converter().reformat(frame, format="rgb24").planes[0]
  rows = memoryview(rgb)[: rgb.line_size * frame.height]
  _send(pipe, b"F", FRAME.pack(secs, rgb.line_size), rows)


def _send(pipe: int, kind: bytes, *parts) -> None:
  """Writes a message."""
  length = sum(len(part) for part in parts)
  for part in (MESSAGE.pack(kind, length), *parts):
    view = memoryview(part)
    while len(view):
      view = view[os.write(pipe, view) :]


def _confine(limits: Limits, parent_pid: int) -> None:
  """Sets the limits of this process, and ends it with its parent."""
  if sys.platform == "linux":
    # The kernel kills this process when its parent ends, even by SIGKILL.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
      sys.exit(1)
  cpu_secs = math.ceil(limits.secs) * _NUM_THREADS + 10
  for kind, soft, hard in (
    (resource.RLIMIT_AS, limits.memory_bytes, limits.memory_bytes),
    # The soft limit is lower: SIGXCPU, which names the cause, precedes SIGKILL.
    (resource.RLIMIT_CPU, cpu_secs, cpu_secs + 5),
    (resource.RLIMIT_FSIZE, 0, 0),
    (resource.RLIMIT_CORE, 0, 0),
  ):
    _, most = resource.getrlimit(kind)
    if most != resource.RLIM_INFINITY:
      soft, hard = min(soft, most), min(hard, most)
    resource.setrlimit(kind, (soft, hard))


def main() -> None:
  """Decodes one video for `data_prep.video.decode`."""
  parser = argparse.ArgumentParser(
    prog="python -m data_prep.video.decoder_process",
    description="Decodes one video into a pipe. Started by "
    "data_prep.video.decode; not a program for the command line.",
  )
  parser.add_argument(
    "parent_pid", type=int, help="process that reads the pipe"
  )
  parser.add_argument("limits", help="the fields of Limits as JSON")
  parser.add_argument(
    "output",
    help="video, sound (16 kHz, mono), original_sound (its own rate and one or "
    "two channels), or the frame rate of a folder of pictures",
  )
  parser.add_argument("path", help="the video", type=Path)
  args = parser.parse_args()
  limits = Limits(**json.loads(args.limits))
  # Text that a library prints must not come between the frames.
  pipe = os.dup(sys.stdout.fileno())
  os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
  try:
    _confine(limits, args.parent_pid)
    if args.output == "video":
      _decode(args.path, limits, pipe)
    elif args.output in ("sound", "original_sound"):
      _decode_sound(args.path, pipe, args.output == "original_sound")
    else:
      _decode_pictures(args.path, float(args.output), limits, pipe)
  except _Refused as e:
    _send(pipe, b"X", str(e).encode())
  except BrokenPipeError:
    sys.exit(1)  # the parent has closed the pipe
  except MemoryError:
    reason = f"decoder ran out of memory, {limits.memory_bytes >> 20} MiB"
    _send(pipe, b"X", reason.encode())
  except ImportError as e:
    reason = f"PyAV does not load ({e}): pip install av, or allow more memory"
    _send(pipe, b"N", reason.encode())
  except Exception as e:  # standard error is discarded: no traceback
    _send(pipe, b"X", f"decoder failed: {type(e).__name__}: {e}".encode())


if __name__ == "__main__":
  main()
