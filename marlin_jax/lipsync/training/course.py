"""Base course of the sync expert and the generator, and their training."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from marlin_jax.data import prepared_dataset
from marlin_jax.data.prepared_dataset import Dataset
from marlin_jax.data.sampling import RecordDraws, StoredOrder
from marlin_jax.devices import distributed, sharding
from marlin_jax.lipsync import configuration
from marlin_jax.lipsync.training.person_draws import (
  People,
  PersonDraws,
  people_of,
)
from marlin_jax.pretraining.build import count
from marlin_jax.records import cli
from marlin_jax.training import loop, remote_files
from marlin_jax.training.configuration import check_attention
from marlin_jax.training.course import Stage


class LipsyncCourse:
  """Base class of the courses of expert and generator.

  It implements `training.course.Course`.

  A subclass defines `section`, `fields`, `make_step` and `evaluations`; its
  constructor sets `take_clip` and `summary` and calls `set_state`.

  Attributes:
    draws, take_clip: see `training.course.Stage`; the run is a single one.
    section: section of the configuration, 'expert' or 'generator'.
    settings: that section of the configuration.
    summary: the network in one line.
    All others are those of `training.course.Course`.
  """

  section: str
  fields: tuple[str, ...]
  summary: str

  def __init__(
    self,
    config: ConfigDict,
    mesh: Mesh,
    dataset: Dataset,
    eval_dataset: Dataset,
    people: People | None = None,
    clips_per_record: int = 1,
  ):
    """Sets the attributes that do not depend on the networks.

    Args:
      config: a valid configuration; see configs/eval_ls.py.
      mesh: mesh of the devices.
      dataset: training split.
      eval_dataset: evaluation split.
      people: records of each person, to draw people; None: records are drawn.
      clips_per_record: consecutive clips of one record.
    """
    self.config, self.mesh = config, mesh
    self.dataset, self.eval_dataset = dataset, eval_dataset
    if people is None:
      self.draws = RecordDraws(
        dataset, config.seed, order=StoredOrder, num_clips=clips_per_record
      )
    else:
      self.draws = PersonDraws(
        dataset, people, config.seed, num_clips=clips_per_record
      )
    self.settings = config[self.section]
    self.batch_size = self.settings.batch_size
    self.num_steps = self.settings.num_steps
    self.everywhere = sharding.replicated(mesh)

  def set_state(
    self,
    state: Any,
    network: dict[str, Any],
    sources: dict[str, Any] | None = None,
  ) -> None:
    """Sets the first state and the identity.

    Args:
      state: the first state, on the host.
      network: describes the network in the checkpoint's metadata.
      sources: hashes of the weights that the training starts from.
    """
    self.shapes = state
    self.shardings = jax.tree.map(lambda _: self.everywhere, state)
    identity = {
      **network,
      **configuration.identity(self.config, self.section),
      **(sources or {}),
      "data.fingerprint": self.dataset.fingerprint,
      "eval_data.fingerprint": self.eval_dataset.fingerprint,
    }
    self.identity = json.loads(json.dumps(identity))

  @property
  def stages(self) -> list[Stage]:
    return [Stage(self.num_steps, self.draws, self.take_clip, self.make_step)]

  def first_state(self) -> Any:
    """Returns the first state, on the devices."""
    return jax.device_put(self.shapes, self.everywhere)

  def learning_rates(self, state) -> dict[str, float]:
    """Returns {}: the rates are constant."""
    del state
    return {}

  def describe(self) -> list[cli.Row]:
    """Returns data, network, devices, batch and steps."""
    num_params = count(jax.tree.leaves(self.shapes.trained.params))
    return [
      cli.Row(
        "data",
        f"{self.dataset.path}: split '{self.dataset.split}', records: "
        f"{self.dataset.num_records}, videos: {self.dataset.num_videos}; "
        f"evaluated on '{self.eval_dataset.split}', records: "
        f"{self.eval_dataset.num_records}, videos: "
        f"{self.eval_dataset.num_videos}",
      ),
      cli.Row(
        "network",
        f"{self.summary}; {num_params / 1e6:.1f}M trained parameters",
      ),
      cli.Row("devices", sharding.describe(self.mesh)),
      cli.Row("batch", f"{self.batch_size} clips"),
      cli.Row("steps", f"{self.num_steps}"),
    ]


def train(
  config: ConfigDict,
  data: str,
  workdir: str,
  make_course: Callable[..., LipsyncCourse],
):
  """Trains a course.

  Args:
    config: a valid configuration; see configs/eval_ls.py.
    data: data set with sound at 25 frames a second, from data_prep.prepare.
    workdir: workdir of the run; created, or resumed from.
    make_course: called with the first five arguments of LipsyncCourse.

  Returns:
    The last state, and the signal that ended the run early or None.

  Raises:
    UserError: the run cannot start, resume, save or continue.
  """
  remote_files.check_reachable(str(workdir), data)
  with loop.started(config, str(workdir)) as watchdog:
    dataset = prepared_dataset.open_joined(data, config.data.train)
    eval_dataset = prepared_dataset.open_joined(data, config.data.val)
    people = None
    if config.data.sample_by == "subject":
      watchdog.alive("indexing the people", is_limited=False)
      with distributed.process_0_first():
        people = people_of(data, config.data.train, str(workdir))
      watchdog.alive("opening the data")
    mesh = sharding.make_mesh(config.mesh.data)
    platform = mesh.devices.flat[0].platform
    check_attention(config.attention, platform, config.dtype)
    course = make_course(config, mesh, dataset, eval_dataset, people)
    key = f"{course.section}.batch_size"
    sharding.check_batch(mesh, course.batch_size, key)
    return loop.train(course, course.evaluations, workdir, watchdog)
