"""The demo as a web page: inputs, outputs and the steps between them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pandas as pd

from data_prep.inspection import region_pictures
from marlin_jax.browser.analysis import Analyser, Masking, Reading
from marlin_jax.inference import pictures
from marlin_jax.inference.face_windows import FaceVideoError, NoFaceError
from marlin_jax.records.cli import UserError, counted
from marlin_jax.records.schema import REGIONS

# Fonts of the system: the page loads nothing from other hosts.
_THEME = gr.themes.Default(
  font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
)
_CSS = """
.gradio-container {max-width: min(1280px, 100vw) !important; margin: 0 auto}
code {overflow-wrap: anywhere !important; display: inline !important}
#video video {max-height: 320px}
#legend span {display: inline-block; margin: 0 1em .2em 0; white-space: nowrap}
#legend i {display: inline-block; width: .8em; height: .8em; margin-right: .4em;
  border: 1px solid #8888; vertical-align: -.05em}
"""
_NO_FACE = (
  "No face was found in this video. If it shows the crop of a face already, "
  "clear “Crop the face” and run it again."
)
_CHOOSE = "Choose another file, a video that FFmpeg can decode."
# How long the files of a visitor are kept, and how often they are looked
# through, in seconds.
_KEEP_SECS, _SWEEP_SECS = 1800, 300


def launch_options() -> dict[str, Any]:
  """Returns arguments of `Blocks.launch`: no link to the outside."""
  return {
    "theme": _THEME,
    "css": _CSS,
    "share": False,
    "footer_links": [],
    "run_history": False,
    "enable_monitoring": False,
    "max_file_size": "500mb",
  }


class Page:
  """Components of the page, and the function that fills them.

  Attributes:
    blocks: the Gradio app.
  """

  def __init__(
    self,
    analyser: Analyser,
    *,
    masking: Masking,
    title: str,
    examples: list[Path],
  ) -> None:
    """Lays out the page.

    Args:
      analyser: see `Analyser`.
      masking: masks to begin with.
      title: name of the weights.
      examples: videos offered for a first try.
    """
    self._analyser = analyser
    with gr.Blocks(
      title="marlin_jax",
      analytics_enabled=False,
      delete_cache=(_SWEEP_SECS, _KEEP_SECS),
    ) as self.blocks:
      gr.Markdown(f"# MARLIN on your video\nWeights: `{title}`")
      with gr.Row():
        with gr.Column(scale=1, min_width=280):
          inputs = self._inputs(masking, examples)
        with gr.Column(scale=3, min_width=320):
          self._outputs()
      run = inputs.pop()
      outputs = [self._status, *self._results]
      gr.on(
        [run.click, inputs[0].change],
        self._show,
        inputs,
        outputs,
        show_progress_on=self._status,
        trigger_mode="always_last",
        concurrency_limit=1,
        api_name="show",
      )

  # --- Layout -----------------------------------------------------------------

  def _inputs(
    self, masking: Masking, examples: list[Path]
  ) -> list[gr.Component]:
    """Returns the arguments of `_show`, and the button."""
    video = gr.Video(
      label="Video",
      sources=["upload", "webcam"],
      elem_id="video",
    )
    if examples:
      gr.Examples([[str(path)] for path in examples], video, label="Sample")
    crop_face = gr.Checkbox(
      True, label="Crop the face", info="clear it for a video of a face crop"
    )
    strategies = self._analyser.strategies
    first = masking.strategy
    with gr.Accordion("Masking", open=False):
      strategy = gr.Dropdown(
        strategies,
        value=first if first in strategies else strategies[0],
        label="Strategy",
        filterable=False,
      )
      masked = gr.Slider(
        0.1, 0.95, masking.ratio, step=0.05, label="Masked share"
      )
      seed = gr.Number(masking.seed, label="Seed", precision=0, minimum=0)
    run = gr.Button("Run", variant="primary", elem_id="run")
    return [video, crop_face, strategy, masked, seed, run]

  def _outputs(self) -> None:
    self._status = gr.Markdown(
      "Drop a video, record one with the webcam, or choose the sample.",
      elem_id="status",
      min_height=60,
    )

    def looped(label: str, name: str) -> gr.Video:
      return gr.Video(
        label=label,
        elem_id=name,
        autoplay=True,
        loop=True,
        interactive=False,
        min_width=150,
        buttons=[],
      )

    with gr.Row():
      self._crop = looped("Crop and regions", "crop")
      self._seen = looped("Visible patches", "seen")
    with gr.Row():
      self._made = looped("Reconstruction", "made")
      self._heat = looped("Attention", "heat")
    gr.HTML(_legend(), elem_id="legend")
    self._ratios = gr.BarPlot(
      None,
      x="region",
      y="ratio",
      title="Attention by region",
      x_title="1: in proportion to area",
      y_title=" ",
      x_label_angle=-45,
      sort="-y",
      height=280,
      elem_id="ratios",
    )
    self._timeline = gr.LinePlot(
      None,
      x="seconds",
      y="value",
      color="component",
      title="Features over time",
      color_title="component (variance)",
      y_title=" ",
      height=240,
      elem_id="timeline",
    )
    self._results = [self._crop, self._seen, self._made, self._heat]
    self._results += [self._ratios, self._timeline]
    self._label = self._by_window = None
    if self._analyser.classifier is not None:
      description = self._analyser.classifier.description
      is_value = description.kind == "value"
      self._label = gr.Label(
        label=f"Scores: {description.task}",
        elem_id="scores",
        visible=not is_value,  # it shows shares
      )
      self._by_window = gr.LinePlot(
        None,
        x="seconds",
        y="score",
        color="name",
        title="Scores over time",
        y_title=" ",
        y_lim=None if is_value else [0, 1],
        height=240,
        elem_id="scores_over_time",
      )
      self._results += [self._label, self._by_window]

  # --- Steps ------------------------------------------------------------------

  def _show(
    self,
    video: str | None,
    crop_face: bool,
    strategy: str,
    ratio: float,
    seed: int,
    progress: gr.Progress = gr.Progress(),  # noqa: B008
  ) -> Iterator[dict]:
    """Yields new values of components, step by step."""
    empty = dict.fromkeys(self._results)
    if video is None:
      yield empty | {self._status: "There is no video yet."}
      return
    yield empty | {self._status: "Reading the video ..."}
    masking = Masking(strategy, ratio, int(seed))
    # Gradio copies each file before it asks for the next step.
    with tempfile.TemporaryDirectory() as folder:
      try:
        yield from self._steps(
          video, crop_face, masking, Path(folder), progress
        )
      except NoFaceError:
        yield empty | {self._status: _alert(_NO_FACE)}
      except FaceVideoError as e:
        message = f"{Path(video).name}: {e.reason}"
        yield empty | {self._status: _alert(f"{message}. {_CHOOSE}")}
      except (UserError, ValueError) as e:
        yield {self._status: _alert(str(e))}

  def _steps(
    self,
    video: str,
    crop_face: bool,
    masking: Masking,
    folder: Path,
    progress: gr.Progress,
  ) -> Iterator[dict]:
    analyser = self._analyser
    reading = analyser.read(
      video,
      crop_face=crop_face,
      progress=lambda share: progress(share, "Reading the video"),
    )
    clips, windows = reading.clips, reading.windows

    def written(name: str, frames: np.ndarray) -> str:
      """Writes a view of the clips, uint8 (B, T, S, S, 3)."""
      views = pictures.Views((name,), frames[None])
      joined = pictures.join_clips(views, clips.frame_numbers)
      path = folder / f"{name}.mp4"
      pictures.save_frames(
        list(joined.frames[0, 0]), path, fps=float(np.clip(clips.fps, 1, 120))
      )
      return str(path)

    span = (
      f"{counted(len(windows), 'window')} from {windows[0].start_secs:.1f} to "
      f"{windows[-1].end_secs:.1f} s."
    )
    yield {
      self._crop: written("crop", _with_regions(reading)),
      self._status: f"{span} Reconstructing ...",
    }

    notes = [span]
    if not reading.has_face:
      notes.append("No face was parsed in it, so there are no regions.")
    if analyser.marlin.architecture.has_decoder:
      result = analyser.reconstruct(reading, masking)
      _, seen, made = result.views().frames
      notes.append(
        f"Squared error of the masked pixels: {result.loss_pixels:.4f}; of "
        f"each patch's mean colour: {result.loss_own_colour:.4f}."
      )
      if result.task.norm_pix:
        notes.append(
          "These weights predict normalised patches, shown with the true mean "
          "and deviation of each."
        )
      yield {
        self._seen: written("seen", seen),
        self._made: written("made", made),
        self._status: " ".join([*notes, "Attention ..."]),
      }
    else:
      notes.append("These weights have no decoder: no reconstruction.")

    attention = analyser.attend(reading)
    yield {
      self._heat: written("heat", attention.views.frames[1]),
      self._ratios: _bars(attention.ratios),
      self._status: " ".join([*notes, "Features ..."]),
    }

    timeline = analyser.features(
      reading, lambda share: progress(share, "Features")
    )
    shown = {}
    if timeline is None:
      notes.append("One window alone has no timeline.")
    else:
      shown = {
        self._timeline: _lines(
          timeline.secs,
          timeline.values,
          [
            f"{number} ({share:.0%})"
            for number, share in enumerate(timeline.variances, 1)
          ],
          ("value", "component"),
        )
      }
    if analyser.classifier is None:
      yield shown | {self._status: " ".join(notes)}
      return
    yield shown | {self._status: " ".join([*notes, "Scores ..."])}

    scores = analyser.scores(reading)
    names = ", ".join(scores.predicted) or "none of the labels"
    shown = {self._label: scores.values}
    if analyser.classifier.description.kind == "value":
      names = ", ".join(f"{k} {v:.3g}" for k, v in scores.values.items())
      shown = {}
    if scores.by_window is not None:
      shown[self._by_window] = _lines(
        scores.secs,
        scores.by_window,
        list(scores.values),
        ("score", "name"),
      )
    yield shown | {self._status: " ".join([*notes, f"Predicted: {names}."])}


def _alert(message: str) -> str:
  return f"⚠️ **{message}**"


def _with_regions(reading: Reading) -> np.ndarray:
  """Returns the clips with their regions, uint8 (B, T, S, S, 3)."""
  video, labels = reading.clips.video, reading.labels
  if labels is None:
    return video
  # A tubelet shows the regions of its first frame.
  labels = np.repeat(labels, video.shape[1] // labels.shape[1], axis=1)
  size = video.shape[2]
  rows = np.arange(size) * labels.shape[2] // size
  labels = labels[:, :, rows[:, None], rows]
  return np.stack(
    [
      np.stack(list(map(region_pictures.overlay, *clip)))
      for clip in zip(video, labels, strict=True)
    ]
  )


def _legend() -> str:
  """Returns the colours of the regions as HTML; the background has none."""
  colours = region_pictures.COLOURS.tolist()
  return "".join(
    f'<span><i style="background:rgb({",".join(map(str, colour))})"></i>'
    f"{name}</span>"
    for name, colour in zip(REGIONS[1:], colours[1:], strict=True)
  )


def _bars(ratios: dict[str, float]) -> gr.BarPlot | None:
  if not ratios:
    return None
  rows = pd.DataFrame({"region": ratios.keys(), "ratio": ratios.values()})
  return gr.BarPlot(rows, y_lim=[0, 1.05 * max(1, *ratios.values())])


def _lines(
  secs: np.ndarray,
  values: np.ndarray,
  names: list[str],
  columns: tuple[str, str],
) -> pd.DataFrame:
  """Returns float (W, C) values as rows, for a plot with C lines.

  Args:
    secs: float (W,).
    values: float (W, C).
    names: names of the lines; columns without one are left out.
    columns: names of the columns of the values and of the names.
  """
  return pd.DataFrame(
    [
      {"seconds": float(x), columns[0]: float(y), columns[1]: name}
      for name, line in zip(names, values.T, strict=True)
      for x, y in zip(secs, line, strict=True)
    ]
  )
