"""Makes the face in a video speak the words of a sound.

  python -m marlin_jax.eval.ls --mode=generate

The face of each frame is cropped as in training, its lower half is hidden, and
the generator draws it to fit the sound around that frame. `blending` pastes the
drawn lower half into the frame. `video_writer` writes the frames and the sound,
with metadata that mark the file as AI-generated.

  - Video of any frame rate is resampled to 25 frames per second. The output
    lasts as long as the sound: a longer video is cut, a shorter one is played
    backwards, then forwards again, and so on.
  - Frames without a face are unchanged. If there are several faces, the one
    with the longest track speaks.
  - The reference, which shows the generator whose mouth to draw, is the frame
    itself, with its mouth, as in github.com/Rudrabha/Wav2Lip, inference.py: it
    has the same pose and light. In training it is another frame.
  - Silence is a sound like any other: the mouth rests.
  - The sound is written as AAC, at its own sample rate, with two channels at
    most.

Axes: B windows per batch, T frames of a window, S side of the generator's
images, H W pixels of the video, N frames written, R mel rows.
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
from marlin_jax.lipsync import mel_windows
from marlin_jax.lipsync.generation import blending, frame_stream, video_writer
from marlin_jax.lipsync.generation.frame_stream import SourceVideo
from marlin_jax.lipsync.networks import build, inputs
from marlin_jax.records.cli import UserError
from marlin_jax.records.mel_spectrogram import MAX_VALUE, mel_spectrogram
from marlin_jax.records.schema import FRAME_SIZE, SAMPLE_RATE

if TYPE_CHECKING:
  from marlin_jax.lipsync.generation.frame_stream import Models

# Frames per batch; about twice as many frames of the video are in memory. A CPU
# gains nothing from more than one window, and shows progress more often.
BATCH_FRAMES, CPU_BATCH_FRAMES = 64, 16
FINDING, DRAWING = "finding the face", "drawing"
MARK_NOTICE = (
  "The file is marked as AI-generated in its metadata (IPTC digital source "
  "type compositeWithTrainedAlgorithmicMedia). Show faces only of people who "
  "agree to it, and say that it is synthetic."
)

# Called with FINDING or DRAWING, and with the fraction of it that is done.
StageProgress = Callable[[str, float], None]


class GenerationError(UserError):
  """Raised if no video can be generated; the message has path and reason."""


@dataclasses.dataclass(frozen=True)
class Framing:
  """Part of a record's face crop that a generator sees.

  Attributes:
    left, top, right, bottom: edges, as ratios of the sides of the crop.
  """

  left: float = 0.0
  top: float = 0.0
  right: float = 1.0
  bottom: float = 1.0

  def boxes(self, crops: np.ndarray) -> np.ndarray:
    """Returns the boxes (N, 4) of this part for crops (N, 4)."""
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


# Wav2Lip's weights were trained on boxes of the detector S3FD, from brow to
# chin and 10 pixels more (inference.py, --pads), which are not square. A
# record's crop is a square 1.25 times as high as the face mesh. These ratios
# follow from the descriptions of both detectors; they were not measured.
WAV2LIP_FRAMING = Framing(left=0.18, top=0.1, right=0.82, bottom=0.94)


def load_generator(
  path: str | os.PathLike, **network_args: str
) -> tuple[nnx.Module, Framing]:
  """Reads a trained generator.

  Args:
    path: the workdir of --mode=train, a checkpoint in it, or Wav2Lip's
      published wav2lip.pth or wav2lip_gan.pth.
    **network_args: `dtype` and `attention`, see build.read_generator.

  Returns:
    The generator, and its framing.

  Raises:
    WeightsError: there is no generator at `path`, or it cannot be read.
  """
  generator = build.read_generator(path, **network_args)
  is_published = Path(path).expanduser().is_file()
  return generator, WAV2LIP_FRAMING if is_published else Framing()


@dataclasses.dataclass(frozen=True)
class GeneratedVideo:
  """Description of a generated video.

  Attributes:
    path: path of the video.
    num_frames: number of frames.
    num_without_face: frames that show no face and are unchanged.
    num_source_frames: frames of the source video, at 25 per second.
    is_silent: True if the sound is silent throughout.
  """

  path: Path
  num_frames: int
  num_without_face: int
  num_source_frames: int
  is_silent: bool

  def notices(self) -> list[str]:
    """Returns messages for the user; the last one says the file is marked."""
    secs = self.num_frames / mel_windows.FPS
    lines = [f"{self.path}: {self.num_frames} frames, {secs:.1f} s"]
    if self.num_without_face:
      lines.append(
        f"note: {self.num_without_face} of these frames show no face and are "
        "unchanged"
      )
    if self.num_frames > self.num_source_frames:
      lines.append(
        f"note: the sound is longer than the {self.num_source_frames} frames "
        "of the video, which are played backwards and forwards in turn"
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
  progress: StageProgress = lambda stage, fraction: None,
) -> GeneratedVideo:
  """Writes a video whose face speaks the words of a sound.

  Args:
    generator: called as networks.marlin_generator.MarlinGenerator, with its
      attributes `num_frames` and `image_size`; put into evaluation mode.
    video: a video file that shows a face.
    sound: an audio file, or a video with sound; None: the sound of `video`.
    output: the MP4 to write; replaced if it exists.
    framing: part of the face crop that the generator sees; None: all of it.
    models: open face models; None: opens them.
    progress: called with a stage and the fraction of it that is done.

  Raises:
    GenerationError: `output` cannot be written, or the video shows no face
      while the sound lasts.
    FaceVideoError: the video cannot be read or shows no face, or the sound
      cannot be read or is empty.
    VideoWriterError: `output` cannot be written.
    UserError: a face model or a system library is missing.
  """
  sound = video if sound is None else sound
  output = Path(output)
  _check_output(output, video, sound)
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
  pipeline = _Pipeline(
    generator, mel, (framing or Framing()).boxes(source.boxes[shown]), track
  )
  with contextlib.closing(source.frames(total)) as frames:
    drawn = _with_progress(pipeline.run(frames), total, progress)
    _write(output, source.size, drawn, sound)
  return GeneratedVideo(
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
  """Calls `generate` with progress bars, and prints its notices."""
  with contextlib.ExitStack() as stack:
    bars: dict[str, object] = {}

    def progress(stage: str, fraction: float) -> None:
      from tqdm import tqdm

      if stage not in bars:
        bars[stage] = stack.enter_context(
          tqdm(
            desc=stage,
            total=1.0,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
            leave=False,
            disable=None,  # only shown on a terminal
          )
        )
      bars[stage].update(fraction - bars[stage].n)

    generated = generate(
      generator, video, sound, output, framing=framing, progress=progress
    )
  print("\n".join(generated.notices()), flush=True)


def _check_output(
  output: Path, video: str | os.PathLike, sound: str | os.PathLike
) -> None:
  """Raises GenerationError for an impossible output, before any computation."""
  if output.suffix.lower() != ".mp4":
    raise GenerationError(f"cannot write {output}: expected a name in .mp4")
  if not output.parent.is_dir():
    raise GenerationError(
      f"cannot write {output}: create the folder {output.parent} first"
    )
  for source in (video, sound):
    if output.exists() and Path(source).exists() and output.samefile(source):
      raise GenerationError(
        f"cannot write {output}: it is an input; choose another name"
      )


def _with_progress(
  frames: Iterable[np.ndarray], total: int, progress: StageProgress
) -> Iterator[np.ndarray]:
  for i, frame in enumerate(frames):
    yield frame
    progress(DRAWING, (i + 1) / total)


def _write(
  output: Path,
  size: tuple[int, int],
  frames: Iterable[np.ndarray],
  sound: str | os.PathLike,
) -> None:
  """Writes frames and sound in step, so that neither has to be held."""
  with (
    frame_stream.open_sound(sound) as sound_stream,
    video_writer.VideoWriter(
      output,
      size,
      mel_windows.FPS,
      sound_stream.rate,
      sound_stream.num_channels,
    ) as writer,
  ):
    chunks = iter(sound_stream)
    for frame in frames:
      writer.add_frame(frame)
      while writer.sound_secs < writer.secs:
        chunk = next(chunks, None)
        if chunk is None:
          break
        writer.add_sound(chunk)
    for chunk in chunks:
      writer.add_sound(chunk)


# --- Drawing ------------------------------------------------------------------


def windows(track: np.ndarray, num_frames: int) -> list[np.ndarray]:
  """Returns windows that cover all frames with a face.

  In a run of frames with the same face the windows do not overlap, except the
  last one, which ends with the run: the rule of `Clip.window_starts`.

  Args:
    track: int (N,), see `SourceVideo.track`.
    num_frames: frames of a window, T.

  Returns:
    Frame numbers, int (T,) for each window, in ascending order of last frames.
  """
  clip = Clip(num_frames, stride=1)
  run_starts = np.flatnonzero(np.diff(track)) + 1
  return [
    run[clip.indices(start, len(run))]
    for run in np.split(np.arange(len(track)), run_starts)
    if track[run[0]] >= 0
    for start in clip.window_starts(len(run))
  ]


class _Pipeline:
  """Draws the faces of a stream of frames, in batches of windows.

  Args:
    generator: generator in evaluation mode; see `generate`.
    mel: float32 (R, 80), mel spectrogram of the sound.
    boxes: (N, 4), part of each source frame that the generator sees.
    track: int (N,), number of the track in each frame, -1 without a face.
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
    batch_frames = CPU_BATCH_FRAMES if is_cpu else BATCH_FRAMES
    self._batch_size = max(batch_frames // generator.num_frames, 1)
    self._draw = _compiled(generator)
    self._mel = mel
    self._boxes = boxes
    self._has_face = track >= 0
    self._windows = collections.deque(windows(track, generator.num_frames))
    # By frame number: frames not yet yielded, crops of the last T frames, drawn
    # faces.
    self._pending: dict[int, np.ndarray] = {}
    self._crops: dict[int, np.ndarray] = {}
    self._drawn: dict[int, np.ndarray] = {}
    # Frame numbers and crops of windows that are complete.
    self._batch: list[tuple[np.ndarray, np.ndarray]] = []

  def run(self, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yields the frames, uint8 (H, W, 3), with the drawn faces in them."""
    for i, frame in enumerate(frames):
      self._pending[i] = frame
      if self._has_face[i]:
        self._crops[i] = frame_stream.crop(frame, self._boxes[i])
      self._crops.pop(i - self._num_frames, None)
      while self._windows and self._windows[0][-1] == i:
        numbers = self._windows.popleft()
        crops = np.stack([self._crops[number] for number in numbers])
        self._batch.append((numbers, crops))
        if len(self._batch) == self._batch_size:
          self._run_batch()
      # Bounds the memory: faceless frames complete no windows.
      if len(self._pending) >= 2 * self._batch_size * self._num_frames:
        self._run_batch()
      yield from self._finished()
    self._run_batch()
    yield from self._finished()

  def _run_batch(self) -> None:
    """Draws the faces of `_batch`, padded to B windows."""
    if not self._batch:
      return
    size = (FRAME_SIZE, FRAME_SIZE, 3)
    crops = np.zeros((self._batch_size, self._num_frames, *size), np.uint8)
    numbers = np.zeros((self._batch_size, self._num_frames), int)
    for row, (window, window_crops) in enumerate(self._batch):
      numbers[row], crops[row] = window, window_crops
    mels = mel_windows.frame_windows(self._mel, numbers.ravel())
    mels = mels.reshape(*numbers.shape, *mels.shape[1:])
    drawn = np.asarray(self._draw(crops, mels))
    for row in range(len(self._batch)):
      for number, face in zip(numbers[row], drawn[row], strict=True):
        # Where windows overlap, the first one counts.
        if number in self._pending:
          self._drawn.setdefault(int(number), face)
    self._batch.clear()

  def _finished(self) -> Iterator[np.ndarray]:
    """Yields pending frames in order, up to the first that is not drawn yet."""
    for i in list(self._pending):
      if not self._has_face[i]:
        yield self._pending.pop(i)
      elif i in self._drawn:
        yield blending.paste(
          self._pending.pop(i), self._drawn.pop(i), self._boxes[i]
        )
      else:
        return


def _compiled(
  generator: nnx.Module,
) -> Callable[[np.ndarray, np.ndarray], jax.Array]:
  """Returns a jitted function that draws faces.

  It maps uint8 crops (B, T, 224, 224, 3) and float32 mels (B, T, 16, 80) to
  uint8 faces (B, T, S, S, 3).
  """
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
