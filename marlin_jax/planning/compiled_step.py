"""The training step, compiled for devices that need not exist here.

Nothing runs. The compiler reports the memory that the step needs, the bytes
that devices exchange and the bytes that each reads and writes.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import itertools
import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from marlin_jax.devices import chips, sharding
from marlin_jax.planning import hlo, roofline
from marlin_jax.planning.topology import Topology
from marlin_jax.pretraining import build, configuration, flops
from marlin_jax.training.configuration import check_attention

# The TPU compiler's messages for a program that is too large, before and after
# it tries to make it fit.
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)\)")
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

# Context manager around a compilation, which shows the given message meanwhile.
Busy = Callable[[str], AbstractContextManager]


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on each device while a step runs, as the compiler lays them out.

  Attributes:
    arguments: state and batch.
    outputs: new state and metrics.
    reused: outputs that take the place of an argument.
    temporaries: activations, gradients, gathered weights.
    code: the program.
  """

  arguments: int
  outputs: int
  reused: int
  temporaries: int
  code: int

  @property
  def total(self) -> int:
    in_and_out = self.arguments + self.outputs - self.reused
    return in_and_out + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Step:
  """One configuration's step, compiled for a topology.

  Attributes:
    config: the configuration.
    stage: number of the stage of its curriculum, from 0.
    num_stages: number of its stages.
    clips: describes the clips of the stage.
    topology: the devices.
    mesh: size of the mesh along each axis.
    num_microbatches: microbatches of a batch.
    default_microbatches: microbatches that training chooses by its estimate of
      memory, with clips_per_device=0.
    clips_at_once: clips of one microbatch on one device.
    fewest_at_once: see `build.Experiment.fewest_at_once`.
    shards_per_host: parts of the batch, of `num_shards`, that a host reads.
    num_params: parameters of both networks.
    clip_bytes: bytes of one clip's uint8 frames.
    flops_per_clip: FLOPs of a step per clip, see flops.training_step.
    repeated_flops_per_clip: further FLOPs, see flops.repeated_by_remat.
    state_bytes: memory of one device by purpose: parameters, optimisers, batch.
    needed_bytes: memory of one device in total.
    memory: `needed_bytes` in detail; None if the compiler refused the program.
    collectives: see hlo.collectives.
    bytes_to_slices: see hlo.bytes_to_slices.
    fused_attention: see hlo.fused_attention.
    rematerialised: see hlo.rematerialised.
    hbm_bytes: bytes to and from one device's memory in a step.
    trace_secs: seconds to build and trace the step.
    compile_secs: seconds that the compiler takes.
  """

  config: ConfigDict
  stage: int
  num_stages: int
  clips: str
  topology: Topology
  mesh: dict[str, int]
  num_microbatches: int
  default_microbatches: int
  clips_at_once: int
  fewest_at_once: int
  shards_per_host: int
  num_params: int
  clip_bytes: int
  flops_per_clip: float
  repeated_flops_per_clip: float
  state_bytes: dict[str, int]
  needed_bytes: int
  memory: Memory | None
  collectives: list[hlo.Collective]
  bytes_to_slices: int
  fused_attention: dict[str, int]
  rematerialised: int
  hbm_bytes: int
  trace_secs: float
  compile_secs: float

  @property
  def num_shards(self) -> int:
    """Devices among which the batch is split."""
    return self.mesh["data"] * self.mesh["fsdp"]

  @property
  def fits(self) -> bool:
    available = self.topology.memory_bytes
    return self.memory is not None and self.needed_bytes <= available

  @property
  def flops_per_device(self) -> float:
    """FLOPs of the matrix products of a step, recomputation included."""
    per_clip = self.flops_per_clip + self.repeated_flops_per_clip
    return per_clip * self.config.batch_size / len(self.topology.devices)

  def roofline(self) -> roofline.Roofline | None:
    """Returns the least time of a step; None if the chip is unknown."""
    chip, num_slices = self.topology.chip, self.topology.num_slices
    if chip is None or self.memory is None:
      return None
    return roofline.estimate(
      chip,
      chip.peak_flops(self.config.dtype, self.config.matmul_precision),
      flops=self.flops_per_device,
      hbm_bytes=self.hbm_bytes,
      collectives=self.collectives,
      # Of an all-reduce in a ring.
      network_bytes=2 * (num_slices - 1) / num_slices * self.bytes_to_slices,
    )


def compile_steps(
  config: ConfigDict, topology: Topology, busy: Busy
) -> list[Step]:
  """Compiles the steps that training would run, one for each stage.

  See `compile_step`.
  """
  num_stages = len(configuration.stages(config))
  return [compile_step(config, topology, busy, i) for i in range(num_stages)]


def compile_step(
  config: ConfigDict, topology: Topology, busy: Busy, stage: int = 0
) -> Step:
  """Compiles a step that training would run.

  Args:
    config: a valid configuration.
    topology: the devices.
    busy: entered while the compiler works.
    stage: number of the stage of its curriculum, from 0.

  Raises:
    ConfigError: the attention does not run on the devices.
    MeshError: the mesh or the batch does not fit the devices.
    JaxRuntimeError: the compiler fails, for another reason than memory.
  """
  started_at = time.perf_counter()
  mesh = sharding.make_mesh(**config.mesh, devices=topology.devices)
  sharding.check_batch(mesh, config.batch_size)
  platform = topology.devices[0].platform
  check_attention(config.attention, platform, config.dtype)
  num_shards = sharding.num_shards(mesh)
  device_bytes = chips.usable_bytes(topology.memory_bytes, platform)
  stages = build.Experiment(
    config,
    config.num_steps or 1000,  # only the schedule depends on it
    mesh,
    device_bytes,
  ).by_stage
  experiment = stages[stage]
  trainer, architecture = experiment.trainer, experiment.architecture
  shapes = experiment.shapes
  lowered = experiment.lower_step()
  traced_at = time.perf_counter()
  num_microbatches = trainer.num_microbatches
  tubelets = trainer.task.tubelets
  batch_bytes = sum(
    x.size * x.dtype.itemsize for x in experiment.batch_shapes.values()
  )
  state_bytes = _state_bytes(shapes, experiment.layout.shardings)
  state_bytes["batch"] = batch_bytes // num_shards
  if experiment.constants:
    state_bytes["frozen"] = sharding.bytes_per_device(
      experiment.constants, experiment.constants_shardings
    )
  step_memory, text = None, ""
  of_stage = f" stage {stage + 1} of {len(stages)}" if len(stages) > 1 else ""
  with busy(f"compiling{of_stage} for {topology.name}"):
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
      needed = _bytes_in_error(str(e), sum(state_bytes.values()))
    else:
      step_memory = _memory(compiled.memory_analysis())
      needed = step_memory.total
  compiled_at = time.perf_counter()
  if step_memory:
    text = compiled.as_text()
  return Step(
    config=config,
    stage=stage,
    num_stages=len(stages),
    clips=experiment.clips_summary,
    topology=topology,
    mesh=dict(mesh.shape),
    num_microbatches=num_microbatches,
    default_microbatches=experiment.microbatches_of(experiment.clips_that_fit),
    clips_at_once=config.batch_size // num_shards // num_microbatches,
    fewest_at_once=experiment.fewest_at_once,
    shards_per_host=shards_per_host(mesh),
    num_params=build.count((shapes.params, shapes.disc_params)),
    clip_bytes=tubelets.num_tokens * tubelets.pixels,
    flops_per_clip=flops.training_step(
      architecture,
      trainer,
      config.batch_size,
      num_microbatches=num_microbatches,
    ),
    repeated_flops_per_clip=flops.repeated_by_remat(
      architecture, trainer, config.remat
    ),
    state_bytes=state_bytes,
    needed_bytes=needed,
    memory=step_memory,
    collectives=hlo.collectives(text, mesh.size, topology.gpus_per_node),
    bytes_to_slices=hlo.bytes_to_slices(text),
    fused_attention=hlo.fused_attention(text),
    rematerialised=hlo.rematerialised(text),
    hbm_bytes=hlo.memory_bytes(text),
    trace_secs=traced_at - started_at,
    compile_secs=compiled_at - traced_at,
  )


def shards_per_host(mesh: Mesh) -> int:
  """Returns the parts of a batch that the host with the most of them reads.

  Hosts that a part is on, each with some of its devices along tensor, all read
  it.
  """
  shards = mesh.devices.reshape(sharding.num_shards(mesh), -1)
  hosts = [{device.process_index for device in shard} for shard in shards]
  return max(collections.Counter(itertools.chain(*hosts)).values())


def _state_bytes(shapes, shardings) -> dict[str, int]:
  """Returns bytes of one device's part of the state, by purpose."""

  def size(*names):
    trees = [{n: getattr(x, n) for n in names} for x in (shapes, shardings)]
    return sharding.bytes_per_device(*trees)

  return {
    "parameters": size("params", "ema", "fixed", "disc_params"),
    "optimisers": size("opt_state", "disc_opt_state"),
  }


def _memory(stats) -> Memory:
  return Memory(
    arguments=stats.argument_size_in_bytes,
    outputs=stats.output_size_in_bytes,
    reused=stats.alias_size_in_bytes,
    temporaries=stats.temp_size_in_bytes,
    code=stats.generated_code_size_in_bytes,
  )


def _bytes_in_error(message: str, argument_bytes: int) -> int:
  """Returns the bytes that a program needs, from the compiler's error message.

  Args:
    message: error of the compiler.
    argument_bytes: bytes of state and batch, which some messages leave out.

  Raises:
    JaxRuntimeError: the error is not about memory.
  """
  if "RESOURCE_EXHAUSTED" in message:
    used, temporaries = _USED.search(message), _TEMPORARIES.search(message)
    if used:
      return _bytes(*used.groups())
    if temporaries:
      return _bytes(*temporaries.groups()) + argument_bytes
  raise jax.errors.JaxRuntimeError(message)


def _bytes(number: str, unit: str) -> int:
  return int(float(number) * _UNITS[unit])


def with_changes(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
  """Returns a copy of a configuration with other values: {"remat": "full"}."""
  changed = copy.deepcopy(config)
  changed.update_from_flattened_dict(changes)
  return changed
