"""Writes an MP4 with sound whose metadata mark it as AI-generated.

The mark is in two places, for video players and for picture agencies: the
metadata keys `comment`, `description` and `digital_source_type`, and an XMP
packet with IPTC's property `DigitalSourceType` (IPTC Photo Metadata Standard),
which an MPEG-4 file holds in a box of type `uuid` (XMP Specification, part 3).
Neither is a signature, and copying only the frames loses both.

Axes: H W pixels, S samples, C channels.
"""

from __future__ import annotations

import contextlib
import os
import struct
import uuid
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from marlin_jax.records import folders
from marlin_jax.records.cli import UserError

if TYPE_CHECKING:
  import av

SOURCE_TYPE = (
  "http://cv.iptc.org/newscodes/digitalsourcetype/"
  "compositeWithTrainedAlgorithmicMedia"
)
COMMENT = (
  "AI-generated: the mouth in this video was drawn by a neural network to fit "
  "its sound. Made with marlin_jax."
)
MARKS = {
  "comment": COMMENT,
  "description": COMMENT,
  "digital_source_type": SOURCE_TYPE,
}
XMP_BOX = uuid.UUID("be7acfcb-97a9-42e8-9c71-999491e3afac")
_XMP = f"""\
<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about=""
    xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
    xmlns:dc="http://purl.org/dc/elements/1.1/">
   <Iptc4xmpExt:DigitalSourceType>{SOURCE_TYPE}</Iptc4xmpExt:DigitalSourceType>
   <dc:description><rdf:Alt>
    <rdf:li xml:lang="x-default">{COMMENT}</rdf:li>
   </rdf:Alt></dc:description>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>"""

CRF = 18
# Sample rates of AAC (ISO/IEC 14496-3, table 1.18) that players support.
AAC_RATES = (
  *(8000, 11_025, 12_000, 16_000, 22_050),
  *(24_000, 32_000, 44_100, 48_000),
)
# In ITU-T H.273: for colour primaries, transfer function and matrix.
_BT709 = 1
_LIMITED_RANGE = 1


class VideoWriterError(UserError):
  """Raised if a video cannot be written; the message has path and reason."""


class VideoWriter:
  """Context manager that writes frames and sound to an MP4.

  The file gets its name when it is complete. After an exception nothing is left
  behind, and a file that existed before is unchanged.

  Args:
    path: ends in .mp4; replaced if it exists.
    size: width and height of the frames. 4:2:0 needs even sizes: the last
      column or row of odd ones is repeated.
    fps: frames per second.
    rate: samples per second of the sound; resampled to 48 kHz if AAC does not
      support it.
    num_channels: number of channels of the sound, 1 or 2.

  Raises:
    VideoWriterError: `path` cannot be written, or an encoder is missing.
  """

  def __init__(
    self,
    path: str | os.PathLike,
    size: tuple[int, int],
    fps: int,
    rate: int,
    num_channels: int,
  ) -> None:
    import av

    self._path = Path(path)
    for encoder in ("libx264", "aac"):
      if encoder not in av.codecs_available:
        raise VideoWriterError(
          f"{path}: this build of PyAV has no encoder {encoder}; install PyAV "
          "from the Python package index"
        )
    self._partial = self._path.with_name(
      f".{folders.partial_name(self._path.name)}"
    )
    try:
      self._container = av.open(
        str(self._partial),
        "w",
        format="mp4",
        # use_metadata_tags keeps keys that MP4 does not define.
        options={"movflags": "faststart+use_metadata_tags"},
      )
    except OSError as e:
      raise VideoWriterError(f"cannot write {path}: {e.strerror}") from e
    self._container.metadata.update(MARKS)
    self._fps = fps
    self._rate = rate
    self._layout = "mono" if num_channels == 1 else "stereo"
    self._num_frames = self._num_samples = 0
    self._add_streams(size)

  def _add_streams(self, size: tuple[int, int]) -> None:
    video = self._container.add_stream("libx264", rate=self._fps)
    video.width, video.height = (side + side % 2 for side in size)
    video.pix_fmt = "yuv420p"
    video.options = {"crf": str(CRF)}
    # Players guess the colour space by the size if it is not given.
    context = video.codec_context
    context.color_primaries = context.color_trc = context.colorspace = _BT709
    context.color_range = _LIMITED_RANGE
    rate = self._rate if self._rate in AAC_RATES else AAC_RATES[-1]
    sound = self._container.add_stream("aac", rate=rate, layout=self._layout)
    # AAC allows 6144 bits per channel and frame of 1024 samples: 6 per sample.
    num_channels = 1 if self._layout == "mono" else 2
    sound.bit_rate = min(4 * rate, 96_000) * num_channels
    self._video, self._sound = video, sound

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type | None, *_) -> None:
    if kind is None:
      try:
        self._finish()
        return
      finally:
        self._partial.unlink(missing_ok=True)
    # An error of closing must not replace the exception that led here.
    with contextlib.suppress(OSError):
      self._container.close()
    self._partial.unlink(missing_ok=True)

  @property
  def secs(self) -> float:
    """Duration of the frames added so far."""
    return self._num_frames / self._fps

  @property
  def sound_secs(self) -> float:
    """Duration of the sound added so far."""
    return self._num_samples / self._rate

  def add_frame(self, pixels: np.ndarray) -> None:
    """Adds the next frame, uint8 (H, W, 3), RGB."""
    import av
    from av.video.reformatter import Interpolation

    height, width = self._video.height, self._video.width
    padding = height - pixels.shape[0], width - pixels.shape[1]
    if any(padding):
      pixels = np.pad(
        pixels, ((0, padding[0]), (0, padding[1]), (0, 0)), mode="edge"
      )
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
    frame = frame.reformat(
      format="yuv420p",
      dst_colorspace="ITU709",
      # The default truncates colours instead of rounding them.
      interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND,
    )
    frame.pts = self._num_frames
    frame.time_base = Fraction(1, self._fps)
    self._num_frames += 1
    self._encode(self._video, frame)

  def add_sound(self, samples: np.ndarray) -> None:
    """Adds the next samples, int16 (S, C)."""
    import av

    if not len(samples):
      return
    frame = av.AudioFrame.from_ndarray(
      np.ascontiguousarray(samples).reshape(1, -1), "s16", self._layout
    )
    frame.sample_rate = self._rate
    frame.time_base, frame.pts = Fraction(1, self._rate), self._num_samples
    self._num_samples += len(samples)
    self._encode(self._sound, frame)

  def _encode(
    self,
    stream: av.VideoStream | av.AudioStream,
    frame: av.VideoFrame | av.AudioFrame | None,
  ) -> None:
    """Encodes a frame and writes finished packets; None flushes the encoder."""
    import av

    try:
      for packet in stream.encode(frame):
        self._container.mux(packet)
    except av.FFmpegError as e:
      raise VideoWriterError(f"cannot write {self._path}: {e.strerror}") from e

  def _finish(self) -> None:
    self._encode(self._video, None)
    self._encode(self._sound, None)
    packet = _XMP.encode()
    try:
      self._container.close()
      with self._partial.open("ab") as file:
        size = 8 + len(XMP_BOX.bytes) + len(packet)
        file.write(struct.pack(">I4s", size, b"uuid") + XMP_BOX.bytes + packet)
        file.flush()
        os.fsync(file.fileno())
      os.replace(self._partial, self._path)
    except OSError as e:
      raise VideoWriterError(f"cannot write {self._path}: {e.strerror}") from e
