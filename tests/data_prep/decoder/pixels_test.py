"""Pixels as a viewer sees them, and when."""

import io
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data_prep.video.decode import DecodeError, open_video, read_sound
from tests.support.videos import moving_noise, write_video


def read(path: Path) -> tuple[list[np.ndarray], np.ndarray, list[str]]:
  """Returns frames, their times, and notes."""
  with open_video(path) as video:
    pairs = list(video)
    assert pairs[0][0].shape[1::-1] == (video.info.width, video.info.height)
  return (
    [frame for frame, _ in pairs],
    np.array([s for _, s in pairs]),
    (video.notes),
  )


# --- The display matrix -------------------------------------------------------


def quarters(width: int = 64, height: int = 48) -> np.ndarray:
  """Returns a picture of four colours, which no turn or mirror keeps."""
  picture = np.zeros((height, width, 3), np.uint8)
  picture[: height // 2, : width // 2] = 255, 0, 0
  picture[: height // 2, width // 2 :] = 0, 255, 0
  picture[height // 2 :, : width // 2] = 0, 0, 255
  return picture


@pytest.mark.parametrize(
  ("code", "shown"),
  [
    (1, lambda p: p),
    (3, lambda p: p[::-1, ::-1]),
    (6, lambda p: p.swapaxes(0, 1)[:, ::-1]),
    (8, lambda p: p.swapaxes(0, 1)[::-1]),
  ],
)
def test_jpeg_of_cameras_is_shown_as_its_exif_says(tmp_path, code, shown):
  exif = Image.Exif()
  exif[0x0112], exif[0x010F] = code, "camera"
  file = io.BytesIO()
  Image.fromarray(quarters()).save(file, "JPEG", exif=exif)
  path = tmp_path / "v.avi"
  with (
    av.open(io.BytesIO(file.getvalue()), format="jpeg_pipe") as picture,
    av.open(str(path), "w") as container,
  ):
    stream = container.add_stream_from_template(picture.streams.video[0])
    for i in range(3):
      packet = av.Packet(file.getvalue())
      packet.stream, packet.time_base = stream, Fraction(1, 25)
      packet.pts = packet.dts = i
      container.mux(packet)
  # As pictures in a folder, and as motion JPEG.
  folder = tmp_path / "pictures"
  folder.mkdir()
  for i in range(3):
    (folder / f"{i}.jpg").write_bytes(file.getvalue())
  frames = []
  for source, rate in ((folder, 25.0), (path, 0.0)):
    with open_video(source, frame_rate=rate) as video:
      frames += [frame.astype(int) for frame, _ in video]
  expected = shown(quarters())
  assert len(frames) == 6
  for frame in frames:
    assert frame.shape == expected.shape
    assert np.abs(frame - expected).mean() < 8


@pytest.mark.parametrize(
  ("matrix", "shown"),
  [
    ((1, 0, 0, 1), lambda p: p),
    ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
    ((1, 0, 0, -1), lambda p: p[::-1]),
    ((-1, 0, 0, -1), lambda p: p[::-1, ::-1]),
    ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
    ((0, -1, 1, 0), lambda p: np.rot90(p)),
    ((0, 1, 1, 0), lambda p: p.transpose(1, 0, 2)),
    ((0, -1, -1, 0), lambda p: np.rot90(p.transpose(1, 0, 2), 2)),
    # Phones hold level only nearly, and some headers hold a scale.
    ((0.9, 0.1, -0.1, 0.9), lambda p: p),
    ((0.1, 2, -2, 0.1), lambda p: np.rot90(p, -1)),
    ((0, 0, 0, 0), lambda p: p),
  ],
)
def test_every_display_matrix_is_applied(tmp_path, matrix, shown):
  path = write_video(tmp_path / "v.mp4", [quarters()] * 2, crf="0")
  data = bytearray(path.read_bytes())
  at = data.index(b"tkhd") + 4 + 40
  a, b, c, d = (round(value * 65536) for value in matrix)
  data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
  path.write_bytes(data)
  frames, _, _ = read(path)
  expected = shown(quarters())
  assert frames[0].shape == expected.shape
  assert frames[0].flags.c_contiguous
  np.testing.assert_allclose(frames[0], expected, atol=4)


# --- Pixels that are not square -----------------------------------------------


def write_tagged(
  path: Path, frames, pix_fmt="yuv444p", codec="libx264", **tags
):
  """Encodes RGB frames, with attributes of the encoder set."""
  with av.open(str(path), "w") as container:
    stream = container.add_stream(codec, rate=30)
    height, width = frames[0].shape[:2]
    stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
    stream.options = {"crf": "1"}
    for name, value in tags.items():
      setattr(stream.codec_context, name, value)
    for pixels in frames:
      container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
    container.mux(stream.encode())
  return path


@pytest.mark.parametrize(
  ("aspect", "width"),
  [
    (Fraction(2), 128),
    (Fraction(16, 15), 68),
    (Fraction(8, 9), 57),
    (Fraction(1), 64),
    (Fraction(359, 360), 64),
    (Fraction(50), 64),
    (Fraction(1, 50), 64),
  ],
)
def test_pixels_are_made_square_by_width(tmp_path, aspect, width):
  path = write_tagged(
    tmp_path / "v.mp4", [quarters()] * 2, sample_aspect_ratio=aspect
  )
  frames, _, notes = read(path)
  assert frames[0].shape == (48, width, 3)
  assert np.argmax(frames[0][10, width // 4]) == 0
  assert np.argmax(frames[0][10, 3 * width // 4]) == 1
  assert notes == (
    [] if width == 64 else [f"pixels are not square: 64x48 shown as {width}x48"]
  )


# --- Colours ------------------------------------------------------------------

RED, GREEN, BLUE = 200, 80, 40
BT601, BT709 = (0.299, 0.114), (0.2126, 0.0722)


def planes(
  weights: tuple[float, float], size: tuple[int, int], scale: int = 1
) -> list[np.ndarray]:
  """Returns Y, U and V of a colour, limited range, 4:4:4."""
  luma = weights[0] * RED + (1 - sum(weights)) * GREEN + weights[1] * BLUE
  u = (BLUE - luma) / (2 - 2 * weights[1])
  v = (RED - luma) / (2 - 2 * weights[0])
  values = 16 + luma * 219 / 255, 128 + u * 224 / 255, 128 + v * 224 / 255
  return [np.full(size[::-1], round(scale * value)) for value in values]


def write_planes(path: Path, values, pix_fmt="yuv444p", **tags) -> Path:
  """Encodes two frames of Y, U and V without loss."""
  dtype = np.uint8 if pix_fmt == "yuv444p" else np.uint16
  height, width = values[0].shape
  with av.open(str(path), "w") as container:
    stream = container.add_stream("ffv1", rate=30)
    stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
    for name, value in tags.items():
      setattr(stream.codec_context, name, value)
    for _ in range(2):
      frame = av.VideoFrame(width, height, pix_fmt)
      for plane, value in zip(frame.planes, values, strict=True):
        rows = np.zeros((height, plane.line_size // dtype(0).itemsize), dtype)
        rows[:, :width] = value
        plane.update(rows.tobytes())
      container.mux(stream.encode(frame))
    container.mux(stream.encode())
  return path


@pytest.mark.parametrize(
  ("size", "weights"),
  [((1280, 720), BT709), ((1920, 1080), BT709), ((720, 576), BT601)],
)
def test_matrix_of_untagged_video_follows_its_height(tmp_path, size, weights):
  path = write_planes(tmp_path / "v.mkv", planes(weights, size))
  frames, _, _ = read(path)
  found = frames[0].mean(axis=(0, 1))
  np.testing.assert_allclose(found, (RED, GREEN, BLUE), atol=3)


def test_a_matrix_that_is_not_supported_is_no_damage(tmp_path):
  grey = [np.full((48, 64), 128)] * 3
  path = write_planes(tmp_path / "v.mkv", grey, colorspace=8)  # YCgCo
  with pytest.raises(DecodeError, match="yuv444p with matrix 8 .* not supp"):
    read(path)


def pq(nits: float) -> float:
  """Returns the code value of ST 2084, in [0, 1]."""
  m1, m2, c1, c2, c3 = (
    2610 / 16384,
    2523 / 32,
    107 / 128,
    2413 / 128,
    2392 / 128,
  )
  y = (nits / 10_000) ** m1
  return ((c1 + c2 * y) / (1 + c3 * y)) ** m2


def hlg(nits: float) -> float:
  """Returns the code value of HLG of grey light of a display of 1000 nits."""
  scene = (nits / 1000) ** (1 / 1.2)
  if scene <= 1 / 12:
    return (3 * scene) ** 0.5
  return 0.17883277 * np.log(12 * scene - 0.28466892) + 0.55991073


@pytest.mark.parametrize(
  ("curve", "code", "name"), [(16, pq, "PQ"), (18, hlg, "HLG")]
)
def test_high_dynamic_range_is_brought_to_standard(tmp_path, curve, code, name):
  nits = (0.5, 5, 26, 50, 69, 100, 203, 600, 1000)
  columns = np.repeat([round(4 * (16 + 219 * code(n))) for n in nits], 8)
  luma = np.broadcast_to(columns, (48, len(columns)))
  grey = np.full_like(luma, 512)
  path = write_planes(
    tmp_path / "v.mkv",
    [luma, grey, grey],
    "yuv444p10le",
    color_trc=curve,
    color_primaries=9,
    colorspace=9,
    color_range=1,
  )
  frames, _, notes = read(path)
  assert notes == [f"high dynamic range ({name}), brought to standard range"]
  found = frames[0][24, 4::8].astype(float)
  assert np.ptp(found, axis=1).max() <= 2
  found = found[:, 1]
  # Below the knee the light of a screen of 100 nits is kept.
  expected = 255 * (np.array(nits[:5]) / 100) ** (1 / 2.4)
  np.testing.assert_allclose(found[:5], expected, atol=2.5)
  # Above it, brighter is brighter, up to white.
  assert (np.diff(found) > 0).all()
  assert 230 < found[5] < 245
  assert found[-1] >= 254


@pytest.mark.parametrize(
  "tags",
  [
    {"color_primaries": 9, "colorspace": 9},
    {"colorspace": 9},
    {"color_primaries": 9},
    {},
  ],
  ids=lambda tags: "+".join(tags) or "neither",
)
def test_wide_primaries_become_those_of_bt709(tmp_path, tags):
  """A red of BT.709 in BT.2020, at 50 nits: its own light comes out.

  High dynamic range without tags is that of BT.2100, which has only these.
  """
  to_2020 = np.linalg.inv(
    [
      [1.6605, -0.5876, -0.0728],
      [-0.1246, 1.1329, -0.0083],
      [-0.0182, -0.1006, 1.1187],
    ]
  )
  red, green, blue = (pq(n) for n in to_2020 @ (50, 5, 5))
  luma = 0.2627 * red + 0.678 * green + 0.0593 * blue
  u, v = (blue - luma) / 1.8814, (red - luma) / 1.4746
  values = 64 + 876 * luma, 512 + 896 * u, 512 + 896 * v
  path = write_planes(
    tmp_path / "v.mkv",
    [np.full((48, 64), round(value)) for value in values],
    "yuv444p10le",
    color_trc=16,
    color_range=1,
    **tags,
  )
  frames, _, _ = read(path)
  expected = 255 * (np.array((50, 5, 5)) / 100) ** (1 / 2.4)
  np.testing.assert_allclose(frames[0][20, 20], expected, atol=4)


def test_interlace_is_told(tmp_path):
  path = write_video(
    tmp_path / "v.mp4",
    moving_noise(6),
    pix_fmt="yuv420p",
    flags="+ildct+ilme",
    **{"x264-params": "interlaced=1:tff=1"},
  )
  _, _, notes = read(path)
  assert [note.split(":")[0] for note in notes] == ["interlaced"]
  path = write_video(tmp_path / "p.mp4", moving_noise(6), pix_fmt="yuv420p")
  assert read(path)[2] == []


# --- Streams ------------------------------------------------------------------


def write_streams(path: Path, *streams: tuple[int, int, bool]) -> Path:
  """Writes video streams of a width, a number of frames, and default or not."""
  default = av.stream.Disposition.default
  with av.open(str(path), "w") as container:
    added = []
    for width, _, is_default in streams:
      stream = container.add_stream("mjpeg", rate=25)
      stream.width, stream.height, stream.pix_fmt = width, 48, "yuvj420p"
      stream.disposition = default if is_default else av.stream.Disposition(0)
      added.append(stream)
    for stream, (width, num_frames, _) in zip(added, streams, strict=True):
      for pixels in moving_noise(num_frames, width):
        frame = av.VideoFrame.from_ndarray(pixels)
        container.mux(stream.encode(frame.reformat(format="yuvj420p")))
      container.mux(stream.encode())
  return path


@pytest.mark.parametrize(
  ("name", "streams", "width"),
  [
    ("v.mkv", ((32, 9, False), (64, 9, True)), 64),
    ("v.mkv", ((64, 9, True), (32, 9, False)), 64),
    ("v.mkv", ((96, 9, False), (64, 9, True)), 64),
    ("v.mp4", ((32, 9, True), (64, 9, True)), 64),
    ("v.mp4", ((64, 9, True), (64, 9, True)), 64),
    # A poster is no video, though it is large and comes first.
    ("v.mp4", ((96, 1, True), (64, 9, True)), 64),
    ("v.mp4", ((64, 1, True),), 64),
  ],
)
def test_the_stream_that_a_player_shows_is_read(tmp_path, name, streams, width):
  frames, _, _ = read(write_streams(tmp_path / name, *streams))
  assert frames[0].shape == (48, width, 3)
  assert len(frames) == max(n for w, n, _ in streams if w == width)


# --- Times --------------------------------------------------------------------


@pytest.mark.parametrize(
  ("codec", "options"),
  [
    ("libx264", {"bf": "3"}),
    ("libx264", {"bf": "0"}),
    ("mpeg4", {"bf": "2"}),
    ("mpeg4", {"bf": "0"}),
    ("mjpeg", {}),
  ],
)
@pytest.mark.parametrize("suffix", [".avi", ".wmv"])
def test_frames_without_presentation_times_are_in_their_order(
  tmp_path, codec, options, suffix
):
  pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
  source = [np.full((48, 64, 3), 8 * i, np.uint8) for i in range(30)]
  path = write_video(tmp_path / f"v{suffix}", source, codec, pix_fmt, **options)
  frames, secs, _ = read(path)
  atol = 1e-6 if suffix == ".avi" else 1e-3
  np.testing.assert_allclose(secs, np.arange(30) / 30, atol=atol)
  levels = [frame.mean() for frame in frames]
  np.testing.assert_allclose(levels, 8 * np.arange(30), atol=7)


def test_avi_in_matroska_has_the_times_of_presentation(tmp_path):
  """As programs write it that put AVI files into Matroska: V_MS/VFW/FOURCC."""
  source = [np.full((48, 64, 3), 8 * i, np.uint8) for i in range(30)]
  avi = write_video(tmp_path / "v.avi", source, "mpeg4", "yuv420p", bf="2")
  path = tmp_path / "v.mkv"
  with av.open(str(avi)) as read_from, av.open(str(path), "w") as container:
    stream = read_from.streams.video[0]
    copy = container.add_stream_from_template(stream)
    for packet in read_from.demux(stream):
      if packet.size:
        # Decoding times, in the unit of the new file.
        packet.pts = packet.dts = round(packet.dts * 1000 / 30)
        packet.time_base, packet.stream = Fraction(1, 1000), copy
        container.mux(packet)
  data = bytearray(path.read_bytes())
  name = data.find(b"V_MPEG4/ISO/ASP")
  data[name : name + 15] = b"V_MS/VFW/FOURCC"
  private = data.find(b"\x63\xa2", name - 200) + 3
  header = struct.pack(
    "<IiiHH4sIiiII", 40, 64, 48, 1, 24, b"XVID", 0, 0, 0, 0, 0
  )
  data[private : private + 40] = header
  path.write_bytes(data)
  frames, secs, _ = read(path)
  np.testing.assert_allclose(secs, np.arange(30) / 30, atol=1e-3)
  levels = [frame.mean() for frame in frames]
  np.testing.assert_allclose(levels, 8 * np.arange(30), atol=7)


FLASH_SECS = 0.5


def write_part(
  path: Path, format: str, has_sound: bool, num_frames=30
) -> bytes:
  """Returns a second with a flash and a beep in its middle."""
  rate, size = 48_000, 1152
  codecs = ("libx264", "mp3") if format == "matroska" else ("mpeg2video", "mp2")
  at = np.arange(num_frames * rate // 30) / rate
  wave = 16_000 * np.sin(2 * np.pi * 1000 * at)
  wave *= (at >= FLASH_SECS) & (at < FLASH_SECS + 0.05)
  wave = np.pad(wave, (0, -len(wave) % size)).astype(np.int16)
  with av.open(str(path), "w", format=format) as container:
    video = container.add_stream(codecs[0], rate=30)
    video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
    if has_sound:
      sound = container.add_stream(codecs[1], rate=rate, layout="mono")
    num_sent = 0
    for i in range(num_frames):
      level = 220 if i == FLASH_SECS * 30 else 20
      pixels = np.full((48, 64, 3), level, np.uint8)
      container.mux(video.encode(av.VideoFrame.from_ndarray(pixels)))
      while has_sound and num_sent < min((i + 1) * rate / 30, len(wave)):
        part = wave[num_sent : num_sent + size][None]
        frame = av.AudioFrame.from_ndarray(part, "s16", "mono")
        frame.sample_rate, frame.pts = rate, num_sent
        frame.time_base = Fraction(1, rate)
        container.mux(sound.encode(frame))
        num_sent += size
    container.mux(video.encode())
    if has_sound:
      container.mux(sound.encode())
  return path.read_bytes()


@pytest.mark.parametrize("has_sound", [False, True])
@pytest.mark.parametrize(
  ("format", "num_parts"), [("mpegts", 3), ("vob", 3), ("matroska", 2)]
)
def test_times_that_start_again_go_on(tmp_path, format, num_parts, has_sound):
  part = write_part(tmp_path / "part", format, has_sound)
  path = tmp_path / "joined"
  path.write_bytes(num_parts * part)
  frames, secs, notes = read(path)
  assert notes == [f"times start again: {num_parts - 1} times"]
  assert len(frames) == 30 * num_parts
  steps = np.diff(secs)
  assert (steps > 0.02).all()
  # The sound of a part may be longer by the frame that holds its end.
  assert steps.max() < 0.035 + 0.04 * has_sound
  flashes = [s for f, s in zip(frames, secs, strict=True) if f.mean() > 100]
  assert len(flashes) == num_parts
  if has_sound:
    loud = np.flatnonzero(np.abs(read_sound(path).astype(int)) > 3000)
    beeps = loud[np.insert(np.diff(loud) > 1600, 0, True)] / 16_000
    np.testing.assert_allclose(beeps, flashes, atol=3e-3)


def test_continuity_counters_that_start_again_are_no_damage(tmp_path):
  """A later recording goes on in time, but not in the counters of packets."""
  data = write_part(tmp_path / "part", "mpegts", False, num_frames=60)
  packets = [bytearray(data[i : i + 188]) for i in range(0, len(data), 188)]
  # From the first packet of a picture in the second half, past its header.
  is_start = [p[1] & 0x40 and (p[1] & 0x1F, p[2]) == (1, 0) for p in packets]
  middle = next(
    i for i in range(len(packets) // 2, len(packets)) if is_start[i]
  )
  for packet in packets[middle:]:
    packet[3] = packet[3] & 0xF0 | (packet[3] + 5) & 0x0F
  path = tmp_path / "joined.ts"
  path.write_bytes(b"".join(packets))
  frames, secs, _ = read(path)
  assert len(frames) == 60
  np.testing.assert_allclose(np.diff(secs), 1 / 30, atol=1e-3)


@pytest.mark.parametrize(
  ("name", "codec"), [("v.h264", "libx264"), ("v.hevc", "libx265")]
)
def test_a_bare_stream_has_the_rate_of_its_codec(tmp_path, name, codec):
  path = tmp_path / name
  write_video(path, moving_noise(21), codec, "yuv420p", rate=50)
  with open_video(path) as video:
    secs = [secs for _, secs in video]
    assert video.fps == 50
  np.testing.assert_allclose(secs, np.arange(21) / 50, atol=1e-6)


def test_a_rate_that_is_the_unit_of_the_times_is_no_rate(tmp_path):
  secs = [2.5 * i for i in range(45)]
  path = tmp_path / "v.webm"
  write_video(path, moving_noise(45), "libvpx", "yuv420p", secs=secs, rate=1000)
  with open_video(path) as video:
    assert video.info.rate < 60
    assert len(list(video)) == 45
    assert video.fps == pytest.approx(0.4, rel=0.01)
