"""Feature extraction against marlin-pytorch: same weights, clips and machine.

Float32, one clip at a time as the authors' code does, and whole videos through
`extract_video` where ../shared/videos is there. The weights are random, which
changes no time. A table, then the path of a JSON.
"""

import argparse
import sys
from pathlib import Path

import jax
import numpy as np
import torch
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1]))

import authors
import timing
from conftest import VIDEOS

from marlin_jax.formats.weights import Architecture, of_modules
from marlin_jax.marlin import Marlin

SIZES = {
  "S": Architecture(384, 12, 6, 1536),
  "B": Architecture(768, 12, 12, 3072),
  "L": Architecture(1024, 24, 16, 4096),
}
OURS = "marlin_jax"


def compare(size: str, repeats: int) -> list[dict]:
  architecture = SIZES[size]
  encoder = architecture.make_autoencoder()
  weights = of_modules(architecture, nnx.to_pure_dict(nnx.state(encoder)))
  ours, theirs = Marlin(weights), authors.network(weights)
  fused = authors.with_fused_attention(authors.network(weights))
  clip = np.random.default_rng(0).integers(
    0, 256, (1, 16, 224, 224, 3), np.uint8
  )
  clip_torch = authors.clips(clip.astype(np.float32) / 255)
  secs = timing.in_turns(
    {
      "marlin-pytorch": lambda: theirs.extract_features(clip_torch, False),
      "marlin-pytorch with SDPA": lambda: fused.extract_features(
        clip_torch, False
      ),
      OURS: lambda: jax.block_until_ready(ours.extract_features(clip)),
    },
    repeats,
  )
  results = [timing.table(f"{size}, a clip", secs, OURS)]
  video = VIDEOS / "cropped01.mp4"
  if video.is_file():
    authors.without_ffprobe()
    num_windows = {
      "marlin-pytorch": len(theirs.extract_video(str(video))),
      OURS: len(ours.extract_video(video)),
    }
    secs = timing.in_turns(
      {
        "marlin-pytorch": lambda: theirs.extract_video(str(video)),
        OURS: lambda: ours.extract_video(video),
      },
      max(repeats // 2, 3),
    )
    secs = {k: [x / num_windows[k] for x in v] for k, v in secs.items()}
    results.append(timing.table(f"{size}, a window of a video", secs, OURS))
  return results


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--sizes", nargs="+", default=["S", "B"], choices=SIZES)
  parser.add_argument("--repeats", type=int, default=7)
  args = parser.parse_args()
  with torch.no_grad():
    results = [row for s in args.sizes for row in compare(s, args.repeats)]
  timing.save("bench_features", results)


if __name__ == "__main__":
  main()
