"""Prints what the page shows of a video, as JSON: demo_page.py MODEL VIDEO.

A process of its own, as Gradio leaves event loops open.
"""

import json
import sys

from marlin_jax.browser.analysis import Analyser, Masking
from marlin_jax.browser.page import Page
from marlin_jax.inference.marlin import Marlin
from tests.support.demo_models import make_weights


def main(model: str, video: str) -> None:
  page = Page(
    Analyser(
      Marlin(make_weights().encoder_only()),
      Marlin.load_classifier(model),
      max_secs=20.0,
    ),
    masking=Masking("tube", 0.5),
    title="random",
    examples=[],
  )
  shown = {}
  for step in page._show(video, True, "fasking", 0.5, 0, lambda *_: None):
    shown |= {component.elem_id: value for component, value in step.items()}
  print(json.dumps(shown, default=lambda value: type(value).__name__))


if __name__ == "__main__":
  main(*sys.argv[1:])
