"""The warning that the discriminator outweighs the reconstruction."""

import json
import types

import jax
import pytest

from marlin_jax.evaluators.adversary import AdversarialPull
from tests.support.training_runs import train


def test_a_run_warns_at_each_evaluation(face_data, tmp_path):
  result = train(
    tmp_path / "run",
    **{"data.path": face_data, "mask.strategy": "random", "adv.weight": 1e4},
    num_steps=4,
    eval_steps=2,
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout.count("WARNING: train/adv_pull is") == 2


def sentences(folder, pulls, *, start_step=0, max_pull=0.0):
  """Returns what is said after each half of the steps."""
  workdir = types.SimpleNamespace(
    files=types.SimpleNamespace(path=folder), start_step=start_step
  )
  evaluator = AdversarialPull(workdir, max_pull)
  found = []
  for end in (len(pulls) // 2, len(pulls)):
    rows = [{"step": i + 1, "train/adv_pull": x} for i, x in enumerate(pulls)]
    lines = map(json.dumps, [*rows[:end], {"step": end, "eval/loss": 1.0}])
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    found.append(evaluator(types.SimpleNamespace(step=end)).sentence)
  return found


@pytest.mark.parametrize(
  ("pulls", "settings", "warns"),
  [
    ([0.1, 0.2, 0.9, 0.1, 0.2, 0.3], {}, [False, False]),
    # Single steps do not count, earlier ones neither.
    ([5, 6, 7, 0.1, 90, 0.3], {}, [True, False]),
    ([5, 6, 7, 8, 0.1, 9], {"start_step": 3}, [False, True]),
    ([5, 6, 7, 8, 5, 9], {"max_pull": 1.0}, [False, False]),
    ([5, 6, 7, 8, 5, 9], {"max_pull": 10.0}, [True, True]),
    ([], {}, [False, False]),
  ],
)
def test_the_median_since_the_last_evaluation_decides(
  tmp_path, pulls, settings, warns
):
  assert [bool(x) for x in sentences(tmp_path, pulls, **settings)] == warns


def test_other_processes_do_not_read_what_the_first_one_is_writing(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  (tmp_path / "metrics.jsonl").write_text('{"step": 2, "train/adv_p')
  workdir = types.SimpleNamespace(
    files=types.SimpleNamespace(path=tmp_path), start_step=0
  )
  result = AdversarialPull(workdir, 0.0)(types.SimpleNamespace(step=2))
  assert not result.sentence
