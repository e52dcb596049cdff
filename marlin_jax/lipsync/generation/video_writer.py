"""Writes an MP4 with sound that says of itself that a machine made it.

The mark is in two places, so that both players and picture agencies find it:
the metadata keys `comment`, `description` and `digital_source_type`, and an XMP
packet with IPTC's property `DigitalSourceType` (IPTC Photo Metadata Standard),
which an MPEG-4 file holds in a box of type `uuid` (XMP Specification, part 3).
Neither is a signature: whoever copies the pictures alone
loses them.
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
# What AAC knows (ISO/IEC 14496-3, table 1.18), up to what players take.
AAC_RATES = (
  *(8000, 11_025, 12_000, 16_000, 22_050),
  *(24_000, 32_000, 44_100, 48_000),
)
_BT709 = 1  # of ITU-T H.273, for primaries, transfer and matrix alike
_LIMITED_RANGE = 1


class VideoWriterError(UserError):
  """The video cannot be written; the message says where and why."""


class VideoWriter:
  """Writes pictures and sound in step; a context manager.

  What it writes has another name until it is whole: leaving by an exception
  leaves nothing behind, and what was there before stays.

  Args:
    path: ends in .mp4; replaced where it exists.
    size: width and height of the pictures. An odd one is made even by
      repeating the last column or row, which 4:2:0 needs.
    fps: frames per second.
    rate: samples per second of the sound. One that AAC does not know is
      brought to 48 kHz.
    num_channels: of the sound, 1 or 2.

  Raises:
    VideoWriterError: it cannot be written there, or an encoder is missing.
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
      f".{self._path.name}.{uuid.uuid4().hex[:8]}.partial"
    )
    try:
      self._container = av.open(
        str(self._partial),
        "w",
        format="mp4",
        # The second flag keeps keys that the format does not list.
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
    pictures = self._container.add_stream("libx264", rate=self._fps)
    pictures.width, pictures.height = (side + side % 2 for side in size)
    pictures.pix_fmt = "yuv420p"
    pictures.options = {"crf": str(CRF)}
    # Without a word of it, players guess by the size.
    context = pictures.codec_context
    context.color_primaries = context.color_trc = context.colorspace = _BT709
    context.color_range = _LIMITED_RANGE
    rate = self._rate if self._rate in AAC_RATES else AAC_RATES[-1]
    sound = self._container.add_stream("aac", rate=rate, layout=self._layout)
    # A frame of 1024 samples has at most 6144 bits a channel, 6 a sample.
    channels = 1 if self._layout == "mono" else 2
    sound.bit_rate = min(4 * rate, 96_000) * channels
    self._pictures, self._sound = pictures, sound

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: type | None, *_) -> None:
    if kind is None:
      try:
        self._finish()
        return
      finally:
        self._partial.unlink(missing_ok=True)
    # What went wrong first is what is told.
    with contextlib.suppress(OSError):
      self._container.close()
    self._partial.unlink(missing_ok=True)

  @property
  def secs(self) -> float:
    """Length of the pictures so far."""
    return self._num_frames / self._fps

  @property
  def sound_secs(self) -> float:
    """Length of the sound so far."""
    return self._num_samples / self._rate

  def add_picture(self, pixels: np.ndarray) -> None:
    """Adds the next frame, uint8 (H, W, 3), RGB."""
    import av
    from av.video.reformatter import Interpolation

    height, width = self._pictures.height, self._pictures.width
    padding = height - pixels.shape[0], width - pixels.shape[1]
    if any(padding):
      pixels = np.pad(
        pixels, ((0, padding[0]), (0, padding[1]), (0, 0)), mode="edge"
      )
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), "rgb24")
    frame = frame.reformat(
      format="yuv420p",
      dst_colorspace="ITU709",
      # By default colours are cut off, not rounded.
      interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND,
    )
    frame.pts = self._num_frames
    frame.time_base = Fraction(1, self._fps)
    self._num_frames += 1
    self._encode(self._pictures, frame)

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
    """Writes what a frame completes; None: all that is left."""
    import av

    try:
      for packet in stream.encode(frame):
        self._container.mux(packet)
    except av.FFmpegError as e:
      raise VideoWriterError(f"cannot write {self._path}: {e.strerror}") from e

  def _finish(self) -> None:
    self._encode(self._pictures, None)
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
