"""The costs in docs/OBJECTIVES.md are those that `flops` counts."""

import re
from pathlib import Path

import numpy as np
import pytest

from configs import distil_ti, pretrain_b, pretrain_s
from marlin_jax.pretraining import build
from marlin_jax.weights import safetensors_folder
from marlin_jax.weights.architecture import Architecture
from marlin_jax.weights.weights import Weights

DOCUMENT = Path(__file__).parents[2] / "docs" / "OBJECTIVES.md"
ALONE = {"adv.weight": 0.0, "loss.pixel_weight": 0.0, "teacher.weight": 1.0}
# First column of the table: (configuration, overrides, teacher)
ROWS = {
  "masked pixels, adversarial": (pretrain_b, {}, None),
  "masked pixels alone": (pretrain_b, {"adv.weight": 0.0}, None),
  "frame differences": (pretrain_b, {"target.motion_weight": 0.5}, None),
  "region hidden whole": (
    pretrain_b,
    {"mask.strategy": "crfr_p", "loss.region_weight": 0.007},
    None,
  ),
  "latent targets of a finished encoder": (pretrain_b, ALONE, pretrain_s),
  "latent targets of the run's average": (
    pretrain_b,
    ALONE | {"teacher.path": "ema", "ema_decay": 0.999},
    None,
  ),
  "contrast between clips of a person": (
    pretrain_b,
    {"contrast.weight": 0.03, "data.draws_per_unit": 2},
    None,
  ),
  "variance and covariance": (pretrain_b, {"variance.weight": 1.0}, None),
  "distillation into a small encoder": (distil_ti, {}, pretrain_b),
  "sound beside video": (pretrain_b, {"sound.weight": 1.0}, None),
}


def cost(module, overrides, teacher, folder):
  config = module.get_config()
  config.update_from_flattened_dict(overrides)
  if teacher:
    architecture = Architecture.from_config(teacher.get_config())
    architecture = architecture.without_decoder()
    arrays = {
      name: np.zeros(shape, np.float32)
      for name, shape in architecture.shapes().items()
    }
    safetensors_folder.write(Weights(architecture, arrays), folder)
    config.teacher.path = str(folder)
  made = build.Experiment(config, 10)
  return made.flops_per_clip


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_the_cost_in_the_table_is_that_of_flops(row, tmp_path):
  rows = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in DOCUMENT.read_text().splitlines()
    if re.match(r"\| .* \| \d\.\d\d \|$", line)
  ]
  told = {cells[0]: float(cells[-1]) for cells in rows}
  assert told.keys() == ROWS.keys()
  of_marlin = cost(pretrain_b, {}, None, tmp_path)
  found = cost(*ROWS[row], tmp_path) / of_marlin
  assert told[row] == pytest.approx(found, abs=0.0051)
