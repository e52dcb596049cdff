"""Converts decoded pictures to RGB as a screen shows them.

  converter = RgbConverter(pixel_aspect=stream.sample_aspect_ratio)
  send_frame(pipe, converter(frame), secs)

Pictures with non-square pixels are scaled in width. A picture without a colour
matrix is read as BT.709 from 720 rows on, else as BT.601, as in broadcasts.
High dynamic range (PQ of ST 2084, HLG) is that of BT.2100, thus of the
primaries and matrix of BT.2020 where it does not say. It is mapped to standard
range in linear light:

1. code values to light in nits, by the PQ curve; for HLG by the inverse OETF,
   then the system gamma 1.2 of a display of 1000 nits, per channel;
2. the primaries of BT.2020 to those of BT.709;
3. light to the standard range, whose white is 100 nits: up to 70 nits it is
   kept; from there to 1000 nits it is compressed by the Moebius curve of
   FFmpeg's filter `tonemap`;
4. light to code values, by the inverse of BT.1886, a gamma of 2.4.

Metadata of scenes (ST 2094) and the measured peak of a video (ST 2086) are not
read.
"""

from __future__ import annotations

import errno
import re
import struct
from fractions import Fraction

from data_prep.decoder.protocol import FRAME, Refused, send

# Rows from which on a picture is high definition.
HD_HEIGHT = 720
# Pixels that are wider or narrower than this are a fault of the header.
MAX_PIXEL_ASPECT = 4
# Pixels that are closer to square are rounding by an encoder; they are kept.
MIN_STRETCH = 0.01

# Codes of ITU-T H.273, which FFmpeg uses too.
_UNKNOWN = 2
_BT2020_PRIMARIES = 9
HDR_CURVES = {16: "PQ", 18: "HLG"}

_PEAK_NITS = 1000
_WHITE_NITS = 100
_KNEE = 0.7


class RgbConverter:
  """Function that converts decoded pictures of a video to RGB.

  Create it once per video: its creation takes as long as decoding a picture.

  Args:
    pixel_aspect: width of a pixel over its height, from the header; None or 0
      if unknown.
  """

  def __init__(self, pixel_aspect: Fraction | None = None) -> None:
    from av.video.reformatter import VideoReformatter

    self._reformatter = VideoReformatter()
    self._narrow = VideoReformatter()
    self._tone_mappers = {}
    self.pixel_aspect = Fraction(pixel_aspect or 1)
    is_fault = not 1 / MAX_PIXEL_ASPECT <= self.pixel_aspect <= MAX_PIXEL_ASPECT
    if is_fault or abs(self.pixel_aspect - 1) < MIN_STRETCH:
      self.pixel_aspect = Fraction(1)

  def width(self, frame) -> int:
    """Returns the number of square pixels in a row of a picture."""
    return max(round(frame.width * self.pixel_aspect), 1)

  def __call__(self, frame):
    """Returns the picture as 8-bit RGB of the same height, pixels square.

    Raises:
      Refused: its colours are of a kind that is not read.
    """
    import av

    try:
      return self._converted(frame)
    except av.FFmpegError as e:
      if e.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
        raise
      raise Refused(
        f"colours of {frame.format.name} with matrix {int(frame.colorspace)} "
        "of ITU-T H.273 are not supported"
      ) from e

  def _converted(self, frame):
    is_hdr = frame.color_trc in HDR_CURVES and not frame.format.is_rgb
    matrix = None
    if frame.colorspace == _UNKNOWN and not frame.format.is_rgb:
      if is_hdr:
        matrix = "BT2020"
      elif frame.height >= HD_HEIGHT:
        matrix = "ITU709"
    if is_hdr:
      wide = self._reformatter.reformat(
        frame, format="gbrp16le", src_colorspace=matrix, threads=1
      )
      return self._narrow.reformat(
        self._tone_mapper(frame)(wide),
        width=self.width(frame),
        format="rgb24",
        threads=1,
      )
    return self._reformatter.reformat(
      frame,
      width=self.width(frame),
      format="rgb24",
      src_colorspace=matrix,
      threads=1,
    )

  def _tone_mapper(self, frame):
    size = frame.width, frame.height
    key = frame.color_trc, frame.color_primaries, size
    if key not in self._tone_mappers:
      self._tone_mappers[key] = _ToneMapper(frame)
    return self._tone_mappers[key]


# Orientations by number of quarter turns counter-clockwise.
_TURNS = ([1, 0, 0, 1], [0, -1, 1, 0], [-1, 0, 0, -1], [0, 1, -1, 0])


# Orientations by EXIF's code: the tag _ORIENTATION of TIFF 6.0.
_EXIF = (
  *([1, 0, 0, 1], [-1, 0, 0, 1], [-1, 0, 0, -1], [1, 0, 0, -1]),
  *([0, 1, 1, 0], [0, 1, -1, 0], [0, -1, -1, 0], [0, -1, 1, 0]),
)
_ORIENTATION = 0x0112
# The EXIF of a JPEG, PNG or WebP file, up to its TIFF header.
_EXIF_START = re.compile(
  rb"(?:Exif\0\0|eXIf|EXIF.{4})(?=II\*\0|MM\0\*)", re.DOTALL
)


def orientation(frame, file: bytes = b"") -> list[int]:
  """Returns the rotation and mirroring with which a decoded picture is shown.

  The frame's display matrix is rounded to the nearest quarter turn.

  Args:
    frame: the picture.
    file: the file that it is, if it is not one of a video.

  Returns:
    [a, b, c, d], each -1, 0 or 1: the pixel at (x, y) is shown at
    (a x + c y, b x + d y), up to a shift; x points right, y down.
  """
  try:
    data = frame.side_data.get("DISPLAYMATRIX")
  except ValueError:
    # PyAV cannot list side data of which one has an unknown type, such as EXIF.
    # It still has the angle, but not the mirroring.
    return _exif(file) or _TURNS[round(frame.rotation / 90) % 4]
  if data is None:
    return [1, 0, 0, 1]
  a, b, _, c, d = struct.unpack_from("=5i", bytes(data))
  if not (a or b or c or d):
    return [1, 0, 0, 1]
  if abs(b) + abs(c) > abs(a) + abs(d):
    return [0, _sign(b), _sign(c), 0]
  return [_sign(a), 0, 0, _sign(d)]


def _exif(file: bytes) -> list[int] | None:
  """Returns the orientation in the EXIF of a picture, None if there is none."""
  found = _EXIF_START.search(file)
  if not found:
    return None
  tiff = memoryview(file)[found.end() :]
  order = "<" if tiff[:2] == b"II" else ">"
  try:
    (first,) = struct.unpack_from(f"{order}I", tiff, 4)
    (num_tags,) = struct.unpack_from(f"{order}H", tiff, first)
    for i in range(num_tags):
      tag, _, _, code = struct.unpack_from(
        f"{order}HHIH", tiff, first + 2 + 12 * i
      )
      if tag == _ORIENTATION and 1 <= code <= len(_EXIF):
        return _EXIF[code - 1]
  except struct.error:
    pass  # cut off
  return None


def _sign(value: int) -> int:
  return -1 if value < 0 else 1


def send_frame(pipe: int, rgb, secs: float) -> None:
  """Sends an RGB picture and its time."""
  plane = rgb.planes[0]
  rows = memoryview(plane)[: plane.line_size * rgb.height]
  send(pipe, b"F", FRAME.pack(secs, plane.line_size), rows)


# --- High dynamic range -------------------------------------------------------

# Expressions of FFmpeg's filter lutrgb: `val` is a code value, `maxval` the
# largest one; st and ld store and load the variables 0 to 9.
_TO_LIGHT = {
  # ST 2084, equation 4.1; 10,000 nits at 1.
  16: "st(0,pow(val/maxval,1/78.84375));"
  "10000*pow(max(ld(0)-0.8359375,0)/(18.8515625-18.6875*ld(0)),1/0.1593017578125)",
  # BT.2100, table 5; then the system gamma.
  18: "st(0,val/maxval);"
  "1000*pow(if(lte(ld(0),0.5),ld(0)*ld(0)/3,"
  "(exp((ld(0)-0.55991073)/0.17883277)+0.28466892)/12),1.2)",
}
# BT.2087: light of BT.2020 to BT.709.
_TO_BT709 = (
  *(1.6605, -0.5876, -0.0728),
  *(-0.1246, 1.1329, -0.0083),
  *(-0.0182, -0.1006, 1.1187),
)


class _ToneMapper:
  """Function that maps high dynamic range pictures, gbrp16le, to standard."""

  def __init__(self, frame) -> None:
    from av.filter import Graph

    self._graph = Graph()
    self._graph.threads = 1
    light = f"maxval*min(({_TO_LIGHT[frame.color_trc]})/{_PEAK_NITS},1)"
    names = ["rr", "rg", "rb", "gr", "gg", "gb", "br", "bg", "bb"]
    nodes = [
      self._graph.add_buffer(
        width=frame.width,
        height=frame.height,
        format="gbrp16le",
        time_base=Fraction(1, 1000),
      ),
      self._graph.add("lutrgb", f"r='{light}':g='{light}':b='{light}'"),
    ]
    if frame.color_primaries in (_BT2020_PRIMARIES, _UNKNOWN):
      weights = zip(names, _TO_BT709, strict=True)
      text = ":".join(f"{name}={weight}" for name, weight in weights)
      nodes.append(self._graph.add("colorchannelmixer", text))
    code = _to_code()
    nodes.append(self._graph.add("lutrgb", f"r='{code}':g='{code}':b='{code}'"))
    nodes.append(self._graph.add("buffersink"))
    self._graph.link_nodes(*nodes).configure()

  def __call__(self, frame):
    frame.pts = None
    self._graph.vpush(frame)
    return self._graph.vpull()


def _to_code() -> str:
  """Returns the expression from light, 1 at the peak, to code values."""
  peak, knee = _PEAK_NITS / _WHITE_NITS, _KNEE
  a = -knee * knee * (peak - 1) / (knee * knee - 2 * knee + peak)
  b = (knee * knee - 2 * knee * peak + peak) / (peak - 1)
  scale = (b * b + 2 * b * knee + knee * knee) / (b - a)
  return (
    f"st(0,{peak}*val/maxval);"
    f"maxval*pow(if(lte(ld(0),{knee}),ld(0),"
    f"{scale:.9f}*(ld(0)+{a:.9f})/(ld(0)+{b:.9f})),1/2.4)"
  )
