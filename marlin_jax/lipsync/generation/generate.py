"""Makes the face in a video speak the words of a sound.

  python -m marlin_jax.eval.ls --mode=generate

The face of each frame is cropped as in training, its lower half is hidden, and
the generator draws it to fit the sound around that frame (`drawing`; what
published weights get is in `feeding`). `blending` pastes the drawn lower half
into the frame. `video_writer` writes the frames and the sound,
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

Axes: H W pixels of the video, N frames written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from marlin_jax.lipsync import mel_windows
from marlin_jax.lipsync.generation import frame_stream, video_writer
from marlin_jax.lipsync.generation.drawing import Boxes, Drawing, FaceDrawer
from marlin_jax.lipsync.generation.feeding import PublishedFeeding
from marlin_jax.lipsync.generation.frame_stream import SourceVideo
from marlin_jax.lipsync.networks import build
from marlin_jax.records.cli import UserError
from marlin_jax.records.mel_spectrogram import MAX_VALUE, mel_spectrogram
from marlin_jax.records.schema import SAMPLE_RATE

if TYPE_CHECKING:
  from marlin_jax.lipsync.generation.frame_stream import Models

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


def load_generator(path: str | os.PathLike, **network_args: str) -> FaceDrawer:
  """Reads a trained generator.

  Args:
    path: the workdir of --mode=train, a checkpoint in it, or Wav2Lip's
      published wav2lip.pth or wav2lip_gan.pth.
    **network_args: `dtype` and `attention`, see build.read_generator.

  Raises:
    WeightsError: there is no generator at `path`, or it cannot be read.
  """
  generator = build.read_generator(path, **network_args)
  is_published = Path(path).expanduser().is_file()
  return FaceDrawer(generator, PublishedFeeding() if is_published else None)


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
  drawer: FaceDrawer,
  video: str | os.PathLike,
  sound: str | os.PathLike | None,
  output: str | os.PathLike,
  *,
  as_published: bool = False,
  models: Models | None = None,
  progress: StageProgress = lambda stage, fraction: None,
) -> GeneratedVideo:
  """Writes a video whose face speaks the words of a sound.

  Args:
    drawer: draws the faces; see `load_generator`.
    video: a video file that shows a face.
    sound: an audio file, or a video with sound; None: the sound of `video`.
    output: the MP4 to write; replaced if it exists.
    as_published: draw the frames that gen_videos_from_filelist.py of
      github.com/Rudrabha/Wav2Lip draws: only those whose window of sound is
      whole, and none twice.
    models: open face models; None: opens them.
    progress: called with a stage and the fraction of it that is done.

  Raises:
    GenerationError: `output` cannot be written, or the video shows no face
      while the sound lasts, or is shorter than it where none may be shown
      twice.
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
  mel = mel_spectrogram(samples)
  if as_published:
    total = mel_windows.num_inference_windows(mel)
    if source.num_frames < total:
      raise GenerationError(
        f"{video}: it has {source.num_frames} frames, the sound of {sound} "
        f"lasts {total}"
      )
  else:
    total = max(round(len(samples) / SAMPLE_RATE * mel_windows.FPS), 1)
  shown = source.shown(total)
  track = source.track[shown]
  if (track < 0).all():
    raise GenerationError(
      f"{video}: no face in the {total} frames for which the sound lasts; "
      f"the first is at {np.argmax(source.track >= 0) / mel_windows.FPS:.1f} "
      "s: begin the video there"
    )
  crops = source.boxes[shown]
  faces = Boxes(crops, drawer.feeding.boxes(crops, source.size), track)
  drawing = Drawing(drawer, mel, faces)
  with contextlib.closing(source.frames(total)) as frames:
    drawn = _with_progress(drawing.run(frames), total, progress)
    _write(output, source.size, drawn, sound)
  return GeneratedVideo(
    path=output,
    num_frames=total,
    num_without_face=int((track < 0).sum()),
    num_source_frames=source.num_frames,
    is_silent=bool(mel.max() <= -MAX_VALUE),
  )


def run(
  drawer: FaceDrawer,
  video: str | os.PathLike,
  sound: str | os.PathLike | None,
  output: str | os.PathLike,
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

    generated = generate(drawer, video, sound, output, progress=progress)
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
