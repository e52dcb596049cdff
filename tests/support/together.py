"""Coordinates several processes without training; see distributed_test.py.

Each process is started as a program. The processes detect that their values
differ, restore a checkpoint on their mesh with the other value of `scan`, and
save it to another folder:

  together.py WORKDIR STEP TARGET FSDP TENSOR COORDINATOR NUM_PROCESSES ID
"""

import json
import sys
from pathlib import Path

import jax
from ml_collections import ConfigDict

from marlin_jax.checkpoints.manager import Checkpoints
from marlin_jax.devices import distributed, sharding
from marlin_jax.pretraining import build


def main(workdir, step, target, fsdp, tensor, coordinator, num, number):
  step = int(step)
  distributed.initialise(
    ConfigDict(
      {
        "coordinator": coordinator,
        "num_processes": int(num),
        "process_id": int(number),
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
  experiment = build.Experiment(config, config.num_steps, mesh)
  shapes, layout = experiment.shapes, experiment.layout
  source = Checkpoints(f"{workdir}/checkpoints", keep=9)
  meta_file = Path(workdir) / "checkpoints" / str(step) / "meta" / "metadata"
  meta = json.loads(meta_file.read_text())
  state = source.restore(step, shapes, layout.shardings, meta)
  source.close()
  copy = Checkpoints(f"{target}/checkpoints", keep=9)
  copy.save(step, state, meta)
  copy.close()


if __name__ == "__main__":
  main(*sys.argv[1:])
