"""A talking face made to say another sound: any video, any sound, one MP4.

  python -m marlin_jax.eval.ls --mode=generate

The face of each frame is cut out as in training and drawn with its lower half
hidden, with the sound around that frame; `blending` puts the drawn lower half
back, and `video_writer` writes the frames with the sound and the mark that a
machine made them. What may be asked of it:

  - The picture is brought to 25 frames a second. The video written is as long
    as the sound: where the picture is longer its end is left out, where it is
    shorter it is shown backwards, then forwards again, and so on.
  - Where a frame shows no face it is left as it is. Of several faces the one
    that is there longest speaks.
  - The reference, which tells the generator whose mouth it is, is the frame
    itself, mouth and all, as in github.com/Rudrabha/Wav2Lip, inference.py: of
    the same pose and light. In training it is another frame.
  - Silence is a sound: the mouth rests.
  - Sound of any rate is written as it is, but as AAC and of two channels at
    most.

Axes: B windows computed together, T frames of a window, S pixels of the
generator's pictures, H W of the video's, N frames written.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from marlin_jax.data.clip_geometry import Clip
from marlin_jax.inference.face_windows import FaceVideoError
from marlin_jax.lipsync import mel_windows
from marlin_jax.lipsync.generation import blending, frame_stream, video_writer
from marlin_jax.lipsync.generation.frame_stream import SourceVideo
from marlin_jax.lipsync.networks import build, inputs
from marlin_jax.records.cli import UserError
from marlin_jax.records.mel_spectrogram import MAX_VALUE, mel_spectrogram
from marlin_jax.records.schema import FRAME_SIZE, SAMPLE_RATE
from marlin_jax.weights.weights import WeightsError

if TYPE_CHECKING:
  from marlin_jax.lipsync.generation.frame_stream import Models

# Computed together; about twice as many frames of the video are held. A CPU
# gains nothing by more than a window, and the bar moves more often.
BATCH_FRAMES, CPU_BATCH_FRAMES = 64, 16
FINDING, DRAWING = "finding the face", "drawing"
MARK_NOTICE = (
  "The file is marked as AI-generated in its metadata (IPTC digital source "
  "type compositeWithTrainedAlgorithmicMedia). Show faces only of people who "
  "agree to it, and say that it is synthetic."
)

# Called with FINDING or DRAWING and the share of it that is done.
Progress = Callable[[str, float], None]


class GenerationError(UserError):
  """No video can be made; the message says of what file and why."""


@dataclasses.dataclass(frozen=True)
class Framing:
  """What a generator sees of a face, measured from the crop that records have.

  Attributes:
    left, top, right, bottom: where its picture begins and ends, as shares of
      the crop's sides.
  """

  left: float = 0.0
  top: float = 0.0
  right: float = 1.0
  bottom: float = 1.0

  def boxes(self, crops: np.ndarray) -> np.ndarray:
    """Returns the boxes (N, 4) that belong to crops (N, 4)."""
    x, y = crops[:, 0], crops[:, 1]
    width, height = crops[:, 2] - x, crops[:, 3] - y
    return np.stack(
      [
        x + self.left * width,
        y + self.top * height,
        x + self.right * width,
        y + self.bottom * height,
      ],
      axis=1,
    )


# Wav2Lip's weights are of boxes of the detector S3FD, brow to chin and 10
# pixels more (inference.py, --pads), which are no squares. The crop of records
# is a square 1.25 times as high as the face mesh. This is what such a box is in
# it, by what both detectors are said to mark; it was not measured.
WAV2LIP_FRAMING = Framing(left=0.18, top=0.1, right=0.82, bottom=0.94)


def load_generator(
  path: str | os.PathLike, **how: str
) -> tuple[nnx.Module, Framing]:
  """Opens a trained generator.

  Args:
    path: the workdir of a run of --mode=train, a checkpoint in it, or a file of
      Wav2Lip's own weights (wav2lip.pth, wav2lip_gan.pth).
    **how: `dtype` and `attention`, see networks.read_generator.

  Returns:
    The generator, and what it sees of a face.

  Raises:
    GenerationError: there is none, or it cannot be read.
  """
  try:
    generator = build.read_generator(path, **how)
  except WeightsError as e:
    raise GenerationError(str(e)) from e
  is_published = Path(path).expanduser().is_file()
  return generator, WAV2LIP_FRAMING if is_published else Framing()


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What was written.

  Attributes:
    path: where.
    num_frames: N.
    num_without_face: how many of them are as they were.
    num_source_frames: of the video, at 25 a second.
    is_silent: there was nothing to hear.
  """

  path: Path
  num_frames: int
  num_without_face: int
  num_source_frames: int
  is_silent: bool

  def notices(self) -> list[str]:
    """Returns lines for the user; the last says that the file is marked."""
    secs = self.num_frames / mel_windows.FPS
    lines = [f"{self.path}: {self.num_frames} frames, {secs:.1f} s"]
    if self.num_without_face:
      lines.append(
        f"note: {self.num_without_face} of these frames show no face and were "
        "left as they are"
      )
    if self.num_frames > self.num_source_frames:
      lines.append(
        f"note: the sound is longer than the video's {self.num_source_frames} "
        "frames, which are shown backwards and forwards in turn"
      )
    if self.is_silent:
      lines.append("note: the sound is silent from beginning to end")
    return [*lines, MARK_NOTICE]


def generate(
  generator: nnx.Module,
  video: str | os.PathLike,
  sound: str | os.PathLike | None,
  output: str | os.PathLike,
  *,
  framing: Framing | None = None,
  models: Models | None = None,
  progress: Progress = lambda stage, share: None,
) -> Outcome:
  """Writes a video whose face says what a sound says.

  Args:
    generator: as models.lipsync_generator.LipsyncGenerator: takes masked,
      reference and mels; has `num_frames` and `image_size`. It is put into
      evaluation mode.
    video: shows a face.
    sound: a file of sound, or a video for the sound in it; None: that of
      `video`.
    output: the MP4 to write; replaced where it exists.
    framing: what the generator sees of a face; the crop of records where None.
    models: face models that are open already; else they are opened.
    progress: see `Progress`.

  Raises:
    GenerationError: a file cannot be read or written, shows no face where one
      is needed, or has no sound.
    RuntimeError: this machine lacks a model file or a library.
  """
  sound = video if sound is None else sound
  output = Path(output)
  _check_output(output, video, sound)
  try:
    samples = frame_stream.read_sound(sound)
    source = SourceVideo(
      video, mel_windows.FPS, models, lambda share: progress(FINDING, share)
    )
    total = max(round(len(samples) / SAMPLE_RATE * mel_windows.FPS), 1)
    shown = source.shown(total)
    track = source.track[shown]
    if (track < 0).all():
      raise GenerationError(
        f"{video}: no face in the {total} frames for which the sound lasts; "
        f"the first is at {np.argmax(source.track >= 0) / mel_windows.FPS:.1f} "
        "s: begin the video there"
      )
    mel = mel_spectrogram(samples)
    work = _Work(
      generator, mel, (framing or Framing()).boxes(source.boxes[shown]), track
    )
    with contextlib.closing(source.frames(total)) as frames:
      pictures = _reported(work.drawn(frames), total, progress)
      _write(output, source.size, pictures, sound)
  except (FaceVideoError, video_writer.VideoWriterError) as e:
    raise GenerationError(str(e)) from e
  return Outcome(
    path=output,
    num_frames=total,
    num_without_face=int((track < 0).sum()),
    num_source_frames=source.num_frames,
    is_silent=bool(mel.max() <= -MAX_VALUE),
  )


def run(
  generator: nnx.Module,
  video: str | os.PathLike,
  sound: str | os.PathLike | None,
  output: str | os.PathLike,
  *,
  framing: Framing | None = None,
) -> None:
  """As `generate`, with bars that show how far it is, and its notices."""
  with contextlib.ExitStack() as stack:
    bars: dict[str, object] = {}

    def progress(stage: str, share: float) -> None:
      from tqdm import tqdm

      if stage not in bars:
        bars[stage] = stack.enter_context(
          tqdm(
            desc=stage,
            total=1.0,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
            leave=False,
            disable=None,  # where there is no terminal
          )
        )
      bars[stage].update(share - bars[stage].n)

    outcome = generate(
      generator, video, sound, output, framing=framing, progress=progress
    )
  print("\n".join(outcome.notices()), flush=True)


def _check_output(
  output: Path, video: str | os.PathLike, sound: str | os.PathLike
) -> None:
  """Finds out early what would fail late."""
  if output.suffix.lower() != ".mp4":
    raise GenerationError(f"cannot write {output}: expected a name in .mp4")
  if not output.parent.is_dir():
    raise GenerationError(f"cannot write {output}: no folder {output.parent}")
  for source in (video, sound):
    if output.exists() and Path(source).exists() and output.samefile(source):
      raise GenerationError(
        f"cannot write {output}: it is what is read; choose another name"
      )


def _reported(
  pictures: Iterable[np.ndarray], total: int, progress: Progress
) -> Iterator[np.ndarray]:
  for i, picture in enumerate(pictures):
    yield picture
    progress(DRAWING, (i + 1) / total)


def _write(
  output: Path,
  size: tuple[int, int],
  pictures: Iterable[np.ndarray],
  sound: str | os.PathLike,
) -> None:
  """Writes pictures and sound side by side, so that neither has to wait."""
  with (
    frame_stream.open_sound(sound) as track,
    video_writer.VideoWriter(
      output, size, mel_windows.FPS, track.rate, track.num_channels
    ) as writer,
  ):
    parts = iter(track)
    for picture in pictures:
      writer.add_frame(picture)
      while writer.sound_secs < writer.secs:
        part = next(parts, None)
        if part is None:
          break
        writer.add_sound(part)
    for part in parts:
      writer.add_sound(part)


# --- Drawing ------------------------------------------------------------------


def windows(track: np.ndarray, num_frames: int) -> list[np.ndarray]:
  """Returns the windows that cover all frames with a face.

  Within a run of frames that follow one face they lie side by side, and the
  last is moved back to end with it: the rule of `Clip.window_starts`.

  Args:
    track: int (N,), as `SourceVideo.track`.
    num_frames: T.

  Returns:
    int (T,) each, in order of their last frames.
  """
  clip = Clip(num_frames, stride=1)
  ends = np.flatnonzero(np.diff(track)) + 1
  found = []
  for run in np.split(np.arange(len(track)), ends):
    if track[run[0]] >= 0:
      for start in clip.window_starts(len(run)):
        found.append(run[clip.indices(start, len(run))])
  return found


class _Work:
  """Frames on their way through the generator.

  Args:
    generator: see `generate`.
    mel: float32 (R, 80), of the sound.
    boxes: (N, 4), what the generator sees of each frame.
    track: int (N,), -1 without a face.
  """

  def __init__(
    self,
    generator: nnx.Module,
    mel: np.ndarray,
    boxes: np.ndarray,
    track: np.ndarray,
  ) -> None:
    self._num_frames = generator.num_frames
    is_cpu = jax.default_backend() == "cpu"
    at_once = CPU_BATCH_FRAMES if is_cpu else BATCH_FRAMES
    self._batch_size = max(at_once // generator.num_frames, 1)
    self._draw = _compiled(generator)
    self._mel = mel
    self._boxes = boxes
    self._has_face = track >= 0
    self._windows = collections.deque(windows(track, generator.num_frames))
    # By number of frame: those that wait, crops, drawn faces.
    self._waiting: dict[int, np.ndarray] = {}
    self._crops: dict[int, np.ndarray] = {}
    self._drawn: dict[int, np.ndarray] = {}
    # Full windows: their frames and crops.
    self._batch: list[tuple[np.ndarray, np.ndarray]] = []

  def drawn(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yields uint8 (H, W, 3) frames with the drawn face in them."""
    for i, frame in enumerate(frames):
      self._waiting[i] = frame
      if self._has_face[i]:
        self._crops[i] = frame_stream.crop(frame, self._boxes[i])
      self._crops.pop(i - self._num_frames, None)
      while self._windows and self._windows[0][-1] == i:
        numbers = self._windows.popleft()
        crops = np.stack([self._crops[number] for number in numbers])
        self._batch.append((numbers, crops))
        if len(self._batch) == self._batch_size:
          self._run_batch()
      # Where no face is in sight, a batch is not worth waiting for.
      if len(self._waiting) >= 2 * self._batch_size * self._num_frames:
        self._run_batch()
      yield from self._finished()
    self._run_batch()
    yield from self._finished()

  def _run_batch(self) -> None:
    if not self._batch:
      return
    size = (FRAME_SIZE, FRAME_SIZE, 3)
    crops = np.zeros((self._batch_size, self._num_frames, *size), np.uint8)
    numbers = np.zeros((self._batch_size, self._num_frames), int)
    for row, (window, pictures) in enumerate(self._batch):
      numbers[row], crops[row] = window, pictures
    mels = mel_windows.frame_windows(self._mel, numbers.ravel())
    mels = mels.reshape(*numbers.shape, *mels.shape[1:])
    drawn = np.asarray(self._draw(crops, mels))
    for row in range(len(self._batch)):
      for number, picture in zip(numbers[row], drawn[row], strict=True):
        # Where windows overlap, the first is as good as the second.
        if number in self._waiting:
          self._drawn.setdefault(int(number), picture)
    self._batch.clear()

  def _finished(self) -> Iterator[np.ndarray]:
    """Yields what waits for nothing any more, in order."""
    for i in list(self._waiting):
      if not self._has_face[i]:
        yield self._waiting.pop(i)
      elif i in self._drawn:
        yield blending.paste(
          self._waiting.pop(i), self._drawn.pop(i), self._boxes[i]
        )
      else:
        return


def _compiled(
  generator: nnx.Module,
) -> Callable[[np.ndarray, np.ndarray], jax.Array]:
  """Returns uint8 crops (B, T, 224, 224, 3), mels -> uint8 (B, T, S, S, 3)."""
  generator.eval()
  graphdef, state = nnx.split(generator)

  @jax.jit
  def draw(state, crops, mels):
    network = nnx.merge(graphdef, state)
    size = network.image_size
    reference = inputs.resize(inputs.as_floats(crops), size, size)
    drawn = network(inputs.hide_mouth(reference), reference, mels)
    return jnp.rint(255 * jnp.clip(drawn, 0, 1)).astype(jnp.uint8)

  return lambda crops, mels: draw(state, crops, mels)
