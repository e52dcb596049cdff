"""Takes lip-sync training steps on one device and on eight.

Started by tests/lipsync/training/training_test.py as a process of its own,
since the number of devices is fixed when jax starts. Prints one JSON object:
case -> number of devices -> metrics of each step.
"""

import functools
import json

import jax
import numpy as np
import optax

from marlin_jax.devices import sharding
from marlin_jax.lipsync.networks import build
from marlin_jax.lipsync.networks.functional import split_network
from marlin_jax.lipsync.training import expert_step, generator_step
from marlin_jax.weights.architecture import Architecture

NUM_CLIPS, NUM_STEPS, SIZE = 8, 2, 32


def batch():
  np_rng = np.random.default_rng(0)
  shape = (NUM_CLIPS, 5, SIZE, SIZE, 3)
  return {
    "video": np_rng.integers(0, 256, shape, np.uint8),
    "reference": np_rng.integers(0, 256, shape, np.uint8),
    "mel": np_rng.normal(size=(NUM_CLIPS, 16, 80)).astype(np.float32),
    "mels": np_rng.normal(size=(NUM_CLIPS, 5, 16, 80)).astype(np.float32),
    "offset": np.arange(NUM_CLIPS, dtype=np.int32) % 2,
  }


def run(step, state, num_devices):
  """Returns the metrics of NUM_STEPS steps."""
  mesh = sharding.make_mesh(devices=jax.devices()[:num_devices])
  everywhere = sharding.replicated(mesh)
  inputs = jax.device_put(batch(), sharding.batch_sharding(mesh))
  state = jax.device_put(state, everywhere)
  step = jax.jit(step, out_shardings=(everywhere, everywhere))
  rows = []
  for _ in range(NUM_STEPS):
    state, scalars = step(state, inputs)
    rows.append({name: float(value) for name, value in scalars.items()})
  return rows


def main():
  # Not Adam: it takes full steps even if a gradient is a rounding error.
  optimizer = optax.sgd(1e-3)
  judge, judge_variables = split_network(
    build.make_expert(build.expert_meta(5, 1 / 32))
  )
  expert_trainer = expert_step.ExpertTrainer(judge, optimizer)
  architecture = Architecture(
    16, 1, 2, 32, num_frames=5, tubelet_size=1, image_size=SIZE, patch_size=8
  )
  network = build.make_generator(
    build.generator_meta("marlin", 1 / 32, architecture)
  )
  graph, variables = split_network(network, frozen=("encoder",))
  trainer = generator_step.GeneratorTrainer(
    graph, SIZE, judge, None, 0.0, optimizer, optimizer
  )

  def generator_train_step(state, inputs):
    return generator_step.generator_step(
      trainer, state, judge_variables, inputs
    )

  cases = {
    "expert": (
      functools.partial(expert_step.expert_step, expert_trainer),
      expert_trainer.init(judge_variables),
    ),
    "generator": (generator_train_step, trainer.init(variables, None)),
  }
  print(
    json.dumps(
      {
        name: {str(n): run(*case, n) for n in (1, 8)}
        for name, case in cases.items()
      }
    )
  )


if __name__ == "__main__":
  main()
