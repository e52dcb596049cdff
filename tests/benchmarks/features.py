"""Times feature extraction against marlin-pytorch.

Both have the same network and clips and run in turns on the same machine, in
float32: one clip at a time, as in the authors' code, and whole videos through
`extract_video` if ../shared/videos exists. Weights are random, which does not
affect the time. Prints a table and the path of a JSON file.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.benchmarks import timing

TESTS = Path(__file__).parents[1]

SIZES = {
  "S": (384, 12, 6, 1536),
  "B": (768, 12, 12, 3072),
  "L": (1024, 24, 16, 4096),
}
MODULE = "tests.benchmarks.features"
OURS, AUTHORS, FUSED = "marlin_jax", "marlin-pytorch", "marlin-pytorch, SDPA"
VIDEO = TESTS.parents[1] / "shared" / "videos" / "cropped01.mp4"


def make(name: str, size: str, on_video: bool) -> Callable[[], object]:
  """Returns a function that computes the features of a clip, or of VIDEO."""
  import jax
  from flax import nnx

  from marlin_jax.weights.architecture import Architecture
  from marlin_jax.weights.weights import of_modules

  architecture = Architecture(*SIZES[size])
  encoder = nnx.to_pure_dict(nnx.state(architecture.make_autoencoder()))
  weights = of_modules(architecture, encoder)
  clip = np.random.default_rng(0).integers(
    0, 256, (1, 16, 224, 224, 3), np.uint8
  )
  if name == OURS:
    from marlin_jax.inference.marlin import Marlin

    marlin = Marlin(weights)
    if on_video:
      return lambda: marlin.extract_video(VIDEO)
    return lambda: jax.block_until_ready(marlin.extract_features(clip))
  from tests.support import authors

  model = authors.network(weights)
  if name == FUSED:
    model = authors.with_fused_attention(model)
  if on_video:
    authors.without_ffprobe()
    return lambda: model.extract_video(str(VIDEO))
  clip = authors.clips(clip.astype(np.float32) / 255)
  return lambda: model.extract_features(clip, False)


def compare(size: str, repeats: int) -> list[dict]:
  """Times one size; returns the tables."""
  names = (AUTHORS, FUSED, OURS)
  secs, _ = timing.in_turns(
    MODULE, {name: (name, size, False) for name in names}, repeats
  )
  results = [timing.table(f"{size}, a clip", secs, OURS)]
  if VIDEO.is_file():
    secs, _ = timing.in_turns(
      MODULE, {name: (name, size, True) for name in names}, repeats
    )
    # 143 frames; marlin-pytorch drops the incomplete last window.
    num_windows = {OURS: 5, AUTHORS: 4, FUSED: 4}
    secs = {k: [x / num_windows[k] for x in v] for k, v in secs.items()}
    results.append(timing.table(f"{size}, a window of a video", secs, OURS))
  return results


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--sizes", nargs="+", default=["S", "B"], choices=SIZES)
  parser.add_argument("--repeats", type=int, default=5)
  args = parser.parse_args()
  results = [row for s in args.sizes for row in compare(s, args.repeats)]
  timing.save("bench_features", results)


if __name__ == "__main__":
  main()
