"""Shows an encoder at work on your videos, on a page in the browser.

  python -m marlin_jax.demo
  python -m marlin_jax.demo --checkpoint runs/b \\
    --model runs/far/models/appearance-linear-1-0

Drop a video or record one with the webcam. The page shows the crop with its
face regions, the part that the encoder sees, the reconstruction, the attention
and the features over time; with --model also the scores of a trained model.
Runs on CPU. Needs the extra `demo`: pip install 'marlin-jax[demo]'.

The page is served to this machine alone unless --host says otherwise, loads
nothing from other hosts, and nothing that visitors upload is kept after the
command ends. MediaPipe, which finds the faces, sends metrics of its use to
Google, no pictures.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from marlin_jax.records import cli, extras
from marlin_jax.records.cli import UserError

if TYPE_CHECKING:
  from marlin_jax.browser.page import Page

_QUICKSTART = "runs/quickstart"


class DemoError(UserError):
  """The demo cannot start; the message says how to mend it."""


def main(argv: list[str] | None = None) -> int:
  """Returns the exit code: 0, 1 for an error, 130 when interrupted."""
  args = _parser().parse_args(argv)
  return cli.run_command(lambda: _serve(args), "The page is closed.")


def _serve(args: argparse.Namespace) -> None:
  # Imported here, so that --help answers at once.
  from absl import logging

  logging.set_verbosity(logging.ERROR)  # orbax logs every file
  # Uploads and results lie here while the command runs.
  with tempfile.TemporaryDirectory(prefix="marlin_demo_") as folder:
    os.environ["GRADIO_TEMP_DIR"] = folder
    page = _page(args)
    from marlin_jax.browser.page import launch_options

    try:
      page.blocks.launch(
        server_name=args.host,
        server_port=args.port,
        quiet=True,
        prevent_thread_lock=True,
        **launch_options(),
      )
    except OSError as e:
      raise DemoError(
        f"cannot serve on {args.host}, port {args.port or '7860 to 7959'}: in "
        "use, or no address of this machine; choose another --port or --host"
      ) from e
    print(f"{page.blocks.local_url}  (Ctrl-C to end)", flush=True)
    try:
      threading.Event().wait()
    finally:
      page.blocks.close(verbose=False)


def _page(args: argparse.Namespace) -> Page:
  """Opens the weights and lays out the page."""
  checkpoint = args.checkpoint
  if checkpoint == _QUICKSTART and not Path(checkpoint).exists():
    raise DemoError(
      f"no checkpoint at {checkpoint}: run `make quickstart` first (with an "
      "installed package `marlin-train --config=quickstart`), or name another: "
      "--checkpoint runs/b"
    )
  extras.require("demo", "the demo")
  from data_prep import assets
  from marlin_jax.browser.analysis import Analyser, Masking
  from marlin_jax.inference.classifier import VideoClassifier
  from marlin_jax.inference.marlin import Marlin
  from marlin_jax.weights import run_checkpoint

  marlin = Marlin.from_pretrained(checkpoint, full_model=True)
  classifier = VideoClassifier.load(args.model) if args.model else None
  # After the weights, whose errors should not wait for its import.
  from marlin_jax.browser.page import Page

  sample = assets.cache_folder() / "sample_videos" / "carphone_pristine.mp4"
  return Page(
    Analyser(marlin, classifier, max_secs=args.max_secs),
    masking=Masking(*run_checkpoint.masking_of(checkpoint)),
    title=marlin.weights.source,
    examples=[sample] if sample.exists() else [],
  )


# --- Command line -------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
  parser = cli.ArgumentParser("marlin_jax.demo", __doc__)
  add = parser.add_argument
  add(
    "--checkpoint",
    default=_QUICKSTART,
    help="workdir of a run, weights in any format of marlin_jax.convert, or "
    "name of a published model",
  )
  add(
    "--model",
    type=Path,
    help="also show the scores of a model in WORKDIR/models of an evaluation",
  )
  add(
    "--max_secs",
    type=cli.at_least(1),
    default=20,
    help="seconds of a video that are read, from its start",
  )
  add(
    "--host",
    default="127.0.0.1",
    help="address to serve; 0.0.0.0 lets other machines in, and browsers allow "
    "them a webcam over https only",
  )
  add(
    "--port",
    type=cli.at_least(1, 65535),
    help="port to serve; by default the first free one from 7860",
  )
  return parser


if __name__ == "__main__":
  sys.exit(main())
