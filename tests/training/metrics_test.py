"""metrics.jsonl, TensorBoard and the progress line."""

import json

import numpy as np
import pytest

from marlin_jax.training import metrics


def rows(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_a_resumed_run_replaces_what_came_after_its_step(tmp_path):
  writer = metrics.MetricWriter(tmp_path, start_step=0)
  for step in (1, 2, 3):
    writer.write(step, {"train/loss_rec": step / 10})
  writer.close()
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 4, "train/lo')  # killed while writing
  writer = metrics.MetricWriter(tmp_path, start_step=2)
  writer.write(3, {"train/loss_rec": 0.5})
  writer.write_picture(3, "picture", np.zeros((4, 6, 3), np.uint8))
  writer.close()
  assert rows(tmp_path) == [
    {"step": 1, "train/loss_rec": 0.1},
    {"step": 2, "train/loss_rec": 0.2},
    {"step": 3, "train/loss_rec": 0.5},
  ]


@pytest.mark.parametrize("known", [True, False])
def test_the_progress_line_tells_the_utilisation_where_it_is_known(
  capsys, known
):
  progress = metrics.Progress(10, start=0)
  scalars = {
    "train/loss_rec": 0.5,
    "time/step_secs": 60.0,
    "time/clips_per_sec": 12.34,
    "time/data_wait_ratio": 0.012,
  }
  progress.report(4, scalars | ({"time/mfu": 0.4128} if known else {}))
  progress.close()
  mfu = ", MFU 41.3%" if known else ""
  assert capsys.readouterr().out == (
    f"step 4/10: loss_rec 0.5000, 12.3 clips/s{mfu}, data wait 1.2%, "
    "ETA 06:00\n"
  )
