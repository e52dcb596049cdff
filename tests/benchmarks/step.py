"""Times the training step against the authors' and an optimised PyTorch step.

All have the same networks and clips and run in turns on the same machine, each
in a process of its own: in float32 on CPU; on a GPU in bfloat16, the authors'
step in float32 as published. Weights are random, which does not affect the
time. Prints a table and the path of a JSON file.
"""

import argparse
import importlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.benchmarks import timing

TESTS = Path(__file__).parents[1]

OURS, BEST, AUTHORS = "marlin_jax", "best PyTorch", "authors"


def make(
  name: str, size: str, batch_size: int, flags: tuple[str, ...]
) -> Callable[[], object]:
  """Returns a function that takes one step and waits until it is done."""
  # Both libraries share the GPU: JAX must not reserve its memory.
  os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
  if name in (AUTHORS, BEST):
    os.environ["JAX_PLATFORMS"] = "cpu"
  np_rng = np.random.default_rng(0)
  video = np_rng.integers(0, 256, (batch_size, 16, 224, 224, 3), np.uint8)
  if name == OURS:
    return _ours(size, video, flags)
  from flax import nnx

  from marlin_jax.weights.architecture import Architecture
  from marlin_jax.weights.weights import of_modules
  from tests.benchmarks import torch_steps

  architecture = Architecture.from_config(_config(size))
  weights = of_modules(
    architecture,
    nnx.to_pure_dict(nnx.state(architecture.make_autoencoder())),
    nnx.to_pure_dict(nnx.state(architecture.make_discriminator())),
  )
  visible = np.stack(
    [np.sort(np_rng.permutation(1568)[:156]) for _ in range(batch_size)]
  )
  make_step = {
    BEST: torch_steps.best_step,
    AUTHORS: torch_steps.authors_step,
  }[name]
  return make_step(weights, video, visible)


def _config(size):
  return importlib.import_module(
    f"configs.pretrain_{size.lower()}"
  ).get_config()


def _ours(size, video, flags):
  from marlin_jax.devices import xla_flags

  xla_flags.set_for_training()
  import jax

  from marlin_jax.devices import sharding
  from marlin_jax.pretraining import build
  from marlin_jax.training.configuration import flat

  config = _config(size)
  config.batch_size = config.clips_per_device = len(video)
  if jax.default_backend() != "cpu":
    config.dtype = "bfloat16"
  for flag in flags:
    key, _, value = flag.partition("=")
    old = flat(config)[key]
    new = value == "True" if isinstance(old, bool) else type(old)(value)
    config.update_from_flattened_dict({key: new})
  mesh = sharding.make_mesh(devices=jax.devices()[:1])
  experiment = build.Experiment(config, num_steps=1000, mesh=mesh)
  step = experiment.lower_step().compile()
  temporaries = step.memory_analysis().temp_size_in_bytes
  print(f"{size} {' '.join(flags)}: {temporaries / 1e6:.0f} MB of temporaries")
  state = jax.jit(
    experiment.initialise, out_shardings=experiment.layout.shardings
  )()
  grid = experiment.task.tubelets.grid
  regions = np.random.default_rng(1).integers(0, 2**11, (len(video), *grid))
  batch = jax.device_put(
    {"video": video, "regions": regions.astype(np.uint16)},
    sharding.batch_sharding(mesh),
  )
  rng = jax.device_put(jax.random.key(0), sharding.replicated(mesh))

  def run():
    nonlocal state
    state, metrics = step(state, batch, rng)
    return float(metrics["loss"])

  return run


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--sizes", nargs="+", default=["S", "B"])
  parser.add_argument("--batch_size", type=int, default=2)
  parser.add_argument("--repeats", type=int, default=7)
  parser.add_argument(
    "--variant",
    nargs="+",
    action="append",
    default=[],
    metavar="KEY=VALUE",
    help="also time marlin_jax with these config keys, e.g. remat=full "
    "scan=True; can be repeated",
  )
  parser.add_argument("--only_ours", action="store_true")
  args = parser.parse_args()
  results = []
  for size in args.sizes:
    names = (OURS,) if args.only_ours else (AUTHORS, BEST, OURS)
    candidates = {name: (name, size, args.batch_size, ()) for name in names}
    for flags in args.variant:
      name = f"ours, {' '.join(flags)}"
      candidates[name] = (OURS, size, args.batch_size, tuple(flags))
    secs, details = timing.in_turns(
      "tests.benchmarks.step", candidates, args.repeats
    )
    title = f"step, {size}, {args.batch_size} clips"
    results.append(timing.table(title, secs, OURS, details))
  timing.save("bench", results)


if __name__ == "__main__":
  main()
