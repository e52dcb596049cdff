"""Warning when the discriminator outweighs the reconstruction."""

from __future__ import annotations

import json
import math
import statistics

import jax

from marlin_jax.pretraining.train_step import TrainState
from marlin_jax.training.evaluation import Result
from marlin_jax.training.workdir import Workdir

_PULL = "train/adv_pull"
# Below 1, reconstruction decides where the autoencoder goes. The quickstart
# stays below 0.3.
_MOST = 1.0


class AdversarialPull:
  """Reads the metric `train/adv_pull`, and warns where it is above 1."""

  def __init__(self, workdir: Workdir, max_pull: float):
    """Takes the workdir of the run, whose metrics.jsonl it reads.

    Args:
      workdir: the workdir.
      max_pull: `adv.max_pull`, which limits what the metric measures.
    """
    self._workdir, self._last_step = workdir, workdir.start_step
    self._max_pull = max_pull or math.inf

  def __call__(self, state: TrainState) -> Result:
    """Warns if the median since the last call is above 1.

    Process 0 alone reads and prints: others may find half a line in the file
    that it is writing.
    """
    if jax.process_index():
      return Result()
    path = self._workdir.files.path / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    pulls = [
      row[_PULL]
      for row in map(json.loads, lines)
      if _PULL in row and row["step"] > self._last_step
    ]
    self._last_step = int(state.step)
    pull = statistics.median(pulls) if pulls else 0.0
    if min(pull, self._max_pull) <= _MOST:
      return Result()
    return Result(
      sentence=f"WARNING: train/adv_pull is {pull:.3g}: the adversarial "
      "gradient outweighs that of the reconstruction, and the network learns "
      "little else. Lower adv.weight or set adv.max_pull=1; this run resumes "
      "with either if config.allow_change names it"
    )
