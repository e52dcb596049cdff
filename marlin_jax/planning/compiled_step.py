"""What a training step takes on devices that need not be there.

The real step is compiled for them; nothing runs.
"""

from __future__ import annotations

import copy
import dataclasses
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
from ml_collections import ConfigDict

from marlin_jax.devices import chips, sharding
from marlin_jax.planning import hlo, roofline
from marlin_jax.planning.topology import Topology
from marlin_jax.pretraining import experiment, flops, memory
from marlin_jax.training.configuration import flat

# Compilations that a search may take.
_MOST_TRIES = 5
# How the TPU compiler says that a program is too large: at once, or after it
# has tried everything.
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)\)")
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

# Around a compilation, with what is being compiled: tells that it goes on.
Busy = Callable[[str], AbstractContextManager]


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes on each device while a step runs, as the compiler lays them out.

  Attributes:
    arguments: what goes in: state and batch.
    outputs: what comes out: the new state, losses.
    reused: of the outputs, what takes the place of an argument.
    temporaries: activations, gradients, weights put together for use.
    code: the program.
  """

  arguments: int
  outputs: int
  reused: int
  temporaries: int
  code: int

  @property
  def total(self) -> int:
    kept = self.arguments + self.outputs - self.reused
    return kept + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Step:
  """One configuration's step, compiled for a topology.

  Attributes:
    config: the configuration.
    topology: the devices.
    mesh: its shape, by axis.
    num_micro: parts in which a batch is worked through.
    chosen_micro: parts that training takes where clips_per_device is 0.
    clips_at_once: clips of one part on one device.
    num_params: of both networks.
    clip_bytes: of one clip's frames, uint8.
    state_bytes: on one device, by what they are for.
    needed_bytes: on one device, all in all.
    memory: the same in detail; None: the compiler refused.
    collectives: see hlo.
    hbm_bytes: to and from one device's memory.
    trace_secs: until the compiler gets the program.
    compile_secs: until it is done.
  """

  config: ConfigDict
  topology: Topology
  mesh: dict[str, int]
  num_micro: int
  chosen_micro: int
  clips_at_once: int
  num_params: int
  clip_bytes: int
  state_bytes: dict[str, int]
  needed_bytes: int
  memory: Memory | None
  collectives: list[hlo.Collective]
  hbm_bytes: int
  trace_secs: float
  compile_secs: float

  @property
  def num_shards(self) -> int:
    """Devices that share the batch."""
    return self.mesh["data"] * self.mesh["fsdp"]

  @property
  def fits(self) -> bool:
    there = self.topology.memory_bytes
    return self.memory is not None and self.needed_bytes <= there

  @property
  def flops_per_device(self) -> float:
    """Of matrix products in one step, with what remat repeats."""
    per_clip = flops.train_step(self.config, self.num_micro)
    per_clip += flops.repeated_by_remat(self.config)
    return per_clip * self.config.batch_size / len(self.topology.devices)

  def roofline(self) -> roofline.Roofline | None:
    """Least seconds per step; None where the chip is not known."""
    chip, num_slices = self.topology.chip, self.topology.num_slices
    if chip is None or self.memory is None:
      return None
    # Each chip of a slice sums its own part of the gradients with its twins.
    per_slice = len(self.topology.devices) // num_slices
    between = 2 * (num_slices - 1) / num_slices * 4 * self.num_params
    return roofline.estimate(
      chip,
      self.config.dtype,
      flops=self.flops_per_device,
      hbm_bytes=self.hbm_bytes,
      collectives=self.collectives,
      network_bytes=between / per_slice,
    )


def compile_step(config: ConfigDict, topology: Topology, busy: Busy) -> Step:
  """Compiles the step that training would run.

  Args:
    config: a valid configuration.
    topology: the devices.
    busy: entered while the compiler works.

  Raises:
    MeshError: the mesh or the batch does not fit the devices.
  """
  start = time.perf_counter()
  mesh = sharding.make_mesh(**config.mesh, devices=topology.devices)
  sharding.check_batch(mesh, config.batch_size)
  num_shards = sharding.num_shards(mesh)
  usable = chips.usable_bytes(
    topology.memory_bytes, topology.devices[0].platform
  )
  trainer, initialise, *_ = experiment.build(
    config,
    config.num_steps or 1000,  # the schedule's, which takes no memory
    mesh,
    usable,
  )
  shapes = jax.eval_shape(initialise)
  layout = experiment.lay_out(config, mesh, shapes)
  lowered = experiment.lower_step(
    trainer, shapes, layout, mesh, config.batch_size
  )
  traced = time.perf_counter()
  names = ("params", "fixed", "disc_params")
  params = {name: getattr(shapes, name) for name in names}
  chosen = experiment.clips_that_fit(config, mesh, params, usable)
  tubelets = trainer.task.tubelets
  clip = tubelets.num_tokens * (tubelets.pixels + 2)  # uint8, and region bits
  state_bytes = _state_bytes(shapes, layout) | {
    "batch": clip * config.batch_size // num_shards
  }
  found, collectives, hbm_bytes = None, [], 0
  with busy(f"compiling for {topology.name}"):
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as e:
      needed = _refused(str(e), sum(state_bytes.values()))
    else:
      found = _memory(compiled.memory_analysis())
      needed = found.total
  done = time.perf_counter()
  if found:
    text = compiled.as_text()
    collectives = hlo.collectives(text, mesh.size)
    hbm_bytes = hlo.memory_bytes(text)
  return Step(
    config=config,
    topology=topology,
    mesh=dict(mesh.shape),
    num_micro=trainer.num_micro,
    chosen_micro=memory.num_parts(config.batch_size, num_shards, chosen),
    clips_at_once=config.batch_size // num_shards // trainer.num_micro,
    num_params=experiment.count((shapes.params, shapes.disc_params)),
    clip_bytes=tubelets.num_tokens * tubelets.pixels,
    state_bytes=state_bytes,
    needed_bytes=needed,
    memory=found,
    collectives=collectives,
    hbm_bytes=hbm_bytes,
    trace_secs=traced - start,
    compile_secs=done - traced,
  )


def _state_bytes(shapes, layout) -> dict[str, int]:
  """Bytes of a device's part of the state, by what they are for."""

  def size(*names):
    trees = [{n: getattr(x, n) for n in names} for x in (shapes, layout[0])]
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


def _refused(message: str, argument_bytes: int) -> int:
  """Bytes that the compiler says it would need.

  Raises:
    JaxRuntimeError: it says something else.
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


# --- other configurations -----------------------------------------------------


def with_changes(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
  """A copy of a configuration with other values: {"remat": "full"}."""
  changed = copy.deepcopy(config)
  changed.update_from_flattened_dict(changes)
  return changed


def largest(step: Step, busy: Busy) -> Step | None:
  """Looks for the most clips that fit on a device at once, in one part.

  By compiling: guesses follow the line through what was found so far. Stops
  where the next would be less than a sixteenth away, or after _MOST_TRIES.

  Args:
    step: of the configuration.
    busy: see `compile_step`.

  Returns:
    The largest step that fits, None where there is none.
  """
  there = step.topology.memory_bytes
  # Bytes by clips, of what has been compiled.
  needed, best, most = {0: sum(step.state_bytes.values())}, None, None
  clips = step.clips_at_once
  if step.num_micro == 1:
    needed[clips] = step.needed_bytes
    best, most = (step, None) if step.fits else (None, clips)
    clips = _guess(needed, there)
  for _ in range(_MOST_TRIES):
    least = best.clips_at_once if best else 0
    if most is not None and not least < clips < most:
      clips = (least + most) // 2
    if clips - least <= least // 16:
      break
    tried = compile_step(
      with_changes(
        step.config,
        {"batch_size": clips * step.num_shards, "clips_per_device": clips},
      ),
      step.topology,
      busy,
    )
    needed[clips] = tried.needed_bytes
    if tried.fits:
      best = tried
    else:
      most = clips
    clips = _guess(needed, there)
  return best


def _guess(needed: dict[int, int], there: int) -> int:
  """Clips that fit, by the line through the two points nearest to the limit."""
  (a, at_a), (b, at_b) = sorted(
    sorted(needed.items(), key=lambda item: abs(item[1] - there))[:2]
  )
  slope = max((at_b - at_a) / (b - a), 1)
  return int(a + (there - at_a) / slope)


def remedies(step: Step) -> Iterator[dict[str, Any]]:
  """Changes that may make a configuration fit, the least costly first.

  Each stands alone. Those that cannot save enough are left out.
  """
  config, there = step.config, step.topology.memory_bytes
  state = sum(step.state_bytes.values())
  spread = {"mesh.data": 1, "mesh.fsdp": step.num_shards}
  thrifty = {"remat": "full", "scan": True}
  found = []
  if state < there:
    # Activations go with the clips that are there at once.
    excess = (step.needed_bytes - state) / (there - state)
    fewer = {"clips_per_device": max(int(0.9 * step.clips_at_once / excess), 1)}
    if excess < 3 and config.remat == "none":
      found.append({"remat": "dots"})
    if excess < 8:
      found.append(thrifty)
    found += [fewer, thrifty | fewer]
  found += [
    spread,
    thrifty | spread,
    thrifty | spread | {"clips_per_device": 1},
  ]
  values = flat(config) | _values(step)
  seen = [{}]
  for changes in found:
    changes = {k: v for k, v in changes.items() if values[k] != v}
    if changes not in seen:
      seen.append(changes)
      yield changes


def _values(step: Step) -> dict[str, Any]:
  """What the configuration comes to where it leaves the choice."""
  sizes = {f"mesh.{axis}": size for axis, size in step.mesh.items()}
  return {"clips_per_device": step.clips_at_once} | sizes
