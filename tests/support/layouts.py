"""Trains a few steps under many layouts of 8 devices, and prints results.

A process of its own, started by sharding_test.py, since the number of devices
is fixed when jax starts. Prints one JSON object with a result for each case.
"""

import json
import math
import sys
import tempfile
from concurrent import futures
from pathlib import Path

import jax

from configs import pretrain_b
from marlin_jax.devices import sharding
from marlin_jax.models import stacking
from marlin_jax.planning import hlo
from marlin_jax.pretraining import build
from tests.support import cudnn_on_cpu, objectives

BATCH_SIZE = 8

SMALL = {
  "batch_size": BATCH_SIZE,
  "clips_per_device": BATCH_SIZE,
  "data.num_frames": 2,
  "model.width": 32,
  "model.depth": 1,
  "model.num_heads": 2,
  "model.mlp_dim": 64,
  "model.dec_width": 32,
  "model.dec_depth": 1,
  "model.dec_num_heads": 2,
  "model.dec_mlp_dim": 64,
  "adv.weight": 0.1,
  "adv.hidden": 32,
  "optim.base_lr": 0.01,
}
# Options that may conflict with a layout, all at once, and two microbatches.
RICH = SMALL | {
  "adv.gp_weight": 10.0,
  "adv.d_steps": 2,
  "scan": True,
  "remat": "full",
}
# An odd number of tokens is visible.
CUDNN = SMALL | {"attention": "cudnn", "dtype": "bfloat16"}
# name: (overrides, clips at once, (data, fsdp, tensor), steps)
CASES = {
  "one device": (SMALL, 8, (1, 1, 1), 5),
  "data": (SMALL, 1, (8, 1, 1), 5),
  "fsdp": (SMALL, 1, (1, 8, 1), 5),
  "fsdp and tensor": (SMALL, 2, (1, 4, 2), 5),
  "rich, one device": (RICH, 4, (1, 1, 1), 3),
  "rich, all axes": (RICH, 1, (2, 2, 2), 3),
  "cudnn, fsdp and tensor": (CUDNN, 2, (1, 4, 2), 2),
  # The decoder's one head cannot be split.
  "cudnn, rich, all axes": (
    RICH | CUDNN | {"model.dec_num_heads": 1},
    1,
    (2, 2, 2),
    2,
  ),
}
# Every objective, in two microbatches on one device and on all axes; a device
# has at least two clips of a microbatch, which `contrast` pairs.
OBJECTIVE_CASES = {
  f"{name}, {where}": (
    SMALL | objectives.CLIP | {"batch_size": 16} | settings,
    *layout,
    3,
  )
  for name, settings in objectives.OBJECTIVES.items()
  for where, *layout in (
    ("one device", 8, (1, 1, 1)),
    ("all axes", 2, (2, 2, 2)),
  )
}


def start_of(name: str) -> str:
  """Returns the case from whose first state a case starts."""
  start = f"{name.split(',')[0]}, one device"
  return start if start in CASES | OBJECTIVE_CASES else "one device"


class Case:
  """A training step on one layout of devices.

  Construct it in the main thread, which traces the step; `lowered` may be
  compiled in any thread.
  """

  def __init__(self, overrides, clips_at_once, sizes, num_steps):
    config = pretrain_b.get_config()
    config.update_from_flattened_dict(overrides)
    config.clips_per_device = clips_at_once
    self.num_steps = num_steps
    self.mesh = sharding.make_mesh(*sizes, jax.devices()[: math.prod(sizes)])
    experiment = build.Experiment(config, 100, self.mesh)
    self.trainer, self.initialise = experiment.trainer, experiment.initialise
    self.shapes, self.layout = experiment.shapes, experiment.layout
    everywhere = sharding.replicated(self.mesh)
    self.batch = jax.device_put(
      objectives.random_batch(experiment.batch_shapes),
      sharding.batch_sharding(self.mesh),
    )
    self.constants = sharding.put(
      experiment.constants, experiment.constants_shardings
    )
    self.rng = jax.device_put(jax.random.key(0), everywhere)
    self.lowered = experiment.lower_step()

  def run(self, step, state) -> dict:
    """Returns losses, bytes per device, and bytes exchanged per step."""
    state = jax.device_put(
      stacking.in_form_of(self.shapes, state), self.layout.shardings
    )
    losses = []
    for _ in range(self.num_steps):
      donated, (state, scalars) = (
        state,
        step(state, self.batch, self.rng, **self.constants),
      )
      losses.append({k: float(v) for k, v in scalars.items()})
    masks = self.trainer.task.masking
    learned = {
      name: getattr(self.shapes, name)
      for name in ("params", "opt_state", "disc_params", "disc_opt_state")
    }
    return {
      "losses": losses,
      "num_microbatches": self.trainer.num_microbatches,
      "num_tokens": masks.num_tokens,
      "num_visible": masks.num_visible,
      "param_bytes": 4 * build.count(self.shapes.params),
      "disc_bytes": 4 * build.count(self.shapes.disc_params),
      "exchanged": hlo.total_bytes(
        hlo.collectives(step.as_text(), self.mesh.size)
      ),
      "planned_bytes": sharding.bytes_per_device(
        learned, {k: getattr(self.layout.shardings, k) for k in learned}
      ),
      "held_bytes": sum(
        x.addressable_shards[0].data.nbytes
        for x in jax.tree.leaves({k: getattr(state, k) for k in learned})
      ),
      "old_state_is_given_up": all(
        x.is_deleted() for x in jax.tree.leaves(donated)
      ),
    }


def main(names):
  cudnn_on_cpu.install()
  with tempfile.TemporaryDirectory() as folder:
    cases = {}
    for name in names:
      overrides, *rest = (CASES | OBJECTIVE_CASES)[name]
      overrides = objectives.resolved(overrides, Path(folder))
      cases[name] = Case(overrides, *rest)
  with futures.ThreadPoolExecutor(2) as pool:
    steps = pool.map(lambda case: case.lowered.compile(), cases.values())
    first = {
      name: jax.device_get(jax.jit(cases[name].initialise)())
      for name in {start_of(name) for name in names}
    }
    results = {
      name: case.run(step, first[start_of(name)])
      for (name, case), step in zip(cases.items(), steps, strict=True)
    }
  print(json.dumps(results))


if __name__ == "__main__":
  main(sys.argv[1:] or list(CASES))
