"""Coordination of several processes apart from training.

Each a process of its own, started by distributed_test.py. They find that they
differ, restore a checkpoint on their mesh, with `scan` the other way, and save
it again elsewhere:
  together.py WORKDIR STEP TARGET FSDP TENSOR COORDINATOR NUM_PROCESSES ID
"""

import json
import sys
from pathlib import Path

import jax
from ml_collections import ConfigDict

from marlin_jax.devices import distributed, sharding
from marlin_jax.pretraining import build
from marlin_jax.training import checkpoint


def main(workdir, step, target, fsdp, tensor, coordinator, num, me):
  step = int(step)
  distributed.initialise(
    ConfigDict(
      {
        "coordinator": coordinator,
        "num_processes": int(num),
        "process_id": int(me),
        "timeout_secs": 60,
      }
    )
  )
  distributed.check_same({"config.seed": 1, "config.scan": False})
  try:
    distributed.check_same({"config.seed": jax.process_index(), "more": [2]})
  except distributed.StartError as e:
    print(e)
  config = ConfigDict(json.loads((Path(workdir) / "config.json").read_text()))
  config.scan = not config.scan
  mesh = sharding.make_mesh(-1, int(fsdp), int(tensor))
  made = build.make_experiment(config, config.num_steps, mesh)
  shapes = jax.eval_shape(made.initialise)
  layout = build.lay_out(config, mesh, shapes)
  source = checkpoint.Checkpoints(f"{workdir}/checkpoints", keep=9)
  meta_file = Path(workdir) / "checkpoints" / str(step) / "meta" / "metadata"
  meta = json.loads(meta_file.read_text())
  state = source.restore(step, shapes, layout.shardings, meta)
  source.close()
  copy = checkpoint.Checkpoints(f"{target}/checkpoints", keep=9)
  copy.save(step, state, meta)
  copy.close()


if __name__ == "__main__":
  main(*sys.argv[1:])
