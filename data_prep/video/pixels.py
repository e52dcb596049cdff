"""Brings decoded pictures to RGB as a screen shows them.

  converter = RgbConverter(pixel_aspect=stream.sample_aspect_ratio)
  send_frame(pipe, converter(frame), secs)

Pixels that are not square are made square by width. A picture of 720 rows or
more that names no colour matrix is taken for BT.709, a smaller one for BT.601,
as broadcasts are. High dynamic range (PQ of ST 2084, HLG of BT.2100) is brought
to standard range, in light:

1. to light in nits: the PQ curve; for HLG the inverse OETF, then the system
   gamma 1.2 of a display of 1000 nits, per channel;
2. from the primaries of BT.2020 to those of BT.709;
3. 100 nits are the white of standard range. Up to 70% of it light is kept; from
   there to 1000 nits it is compressed to the rest by the curve of Moebius, as
   of FFmpeg's filter tonemap;
4. to code values by the inverse of BT.1886, a gamma of 2.4.

Only the picture is brought over: metadata of single scenes (ST 2094) and the
measured peak of a video (ST 2086) are not read.
"""

from __future__ import annotations

import struct
from fractions import Fraction

from data_prep.video.protocol import FRAME, send

# Rows of a picture from which on it is taken for high definition.
HD_HEIGHT = 720
# A pixel that is longer than that is taken for a fault of the header.
MAX_PIXEL_ASPECT = 4
# Less is the rounding of an encoder: the picture is not worth a resampling.
MIN_STRETCH = 0.01

# Codes of ITU-T H.273, as of FFmpeg.
_UNKNOWN_MATRIX = 2
_BT2020_PRIMARIES = 9
HDR_CURVES = {16: "PQ", 18: "HLG"}

_PEAK_NITS = 1000
_WHITE_NITS = 100
_KNEE = 0.7


class RgbConverter:
  """Function from a decoded picture to one in RGB.

  It is kept for all pictures of a video: to make it anew costs as much as
  decoding.

  Args:
    pixel_aspect: width of a pixel over its height, as the header says; None or
      0 where it says nothing.
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
    """Returns the picture as 8-bit RGB, of the same height."""
    matrix = None
    if (
      frame.colorspace == _UNKNOWN_MATRIX
      and frame.height >= HD_HEIGHT
      and not frame.format.is_rgb
    ):
      matrix = "ITU709"
    if frame.color_trc in HDR_CURVES and not frame.format.is_rgb:
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


# Orientation by quarter turns counter-clockwise.
_TURNS = ([1, 0, 0, 1], [0, -1, 1, 0], [-1, 0, 0, -1], [0, 1, -1, 0])


def orientation(frame) -> list[int]:
  """Returns how a decoded picture is turned or mirrored to be shown.

  Returns:
    [a, b, c, d], each -1, 0 or 1, with a x d or b x c not 0: a pixel at x to
    the right and y down is shown at a x + c y and b x + d y, but for the
    origin. It is the nearest to the frame's display matrix, of any angle.
  """
  try:
    data = frame.side_data.get("DISPLAYMATRIX")
  except ValueError:
    # PyAV lists no side data where it does not know the type of one, such as
    # the EXIF of a motion JPEG. It still tells the angle, but not a mirror.
    return _TURNS[round(frame.rotation / 90) % 4]
  if data is None:
    return [1, 0, 0, 1]
  a, b, _, c, d = struct.unpack_from("=5i", bytes(data))
  if not (a or b or c or d):
    return [1, 0, 0, 1]
  if abs(b) + abs(c) > abs(a) + abs(d):
    return [0, _sign(b), _sign(c), 0]
  return [_sign(a), 0, 0, _sign(d)]


def _sign(value: int) -> int:
  return -1 if value < 0 else 1


def send_frame(pipe: int, rgb, secs: float) -> None:
  """Writes a picture in RGB, and its time, as a message."""
  plane = rgb.planes[0]
  rows = memoryview(plane)[: plane.line_size * rgb.height]
  send(pipe, b"F", FRAME.pack(secs, plane.line_size), rows)


# --- High dynamic range -------------------------------------------------------

# Formulas of FFmpeg's expressions: `val` and `maxval` are the code value and
# the largest one, variables 0 to 9 are set by st and read by ld.
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
  """Filter of 16-bit pictures."""

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
    if frame.color_primaries == _BT2020_PRIMARIES:
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
  """Returns the formula from light, 1 at the peak, to code values."""
  peak, knee = _PEAK_NITS / _WHITE_NITS, _KNEE
  a = -knee * knee * (peak - 1) / (knee * knee - 2 * knee + peak)
  b = (knee * knee - 2 * knee * peak + peak) / (peak - 1)
  scale = (b * b + 2 * b * knee + knee * knee) / (b - a)
  return (
    f"st(0,{peak}*val/maxval);"
    f"maxval*pow(if(lte(ld(0),{knee}),ld(0),"
    f"{scale:.9f}*(ld(0)+{a:.9f})/(ld(0)+{b:.9f})),1/2.4)"
  )
