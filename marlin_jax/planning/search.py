"""Searches other configurations by compiling them: what fits in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from marlin_jax.planning.compiled_step import (
  Busy,
  Step,
  compile_step,
  with_changes,
)
from marlin_jax.training.configuration import flat

# Compilations of a search.
_MAX_TRIES = 4
# A guess of more than _FAR_RATIO times the clips of what has been compiled is
# taken less _FAR_MARGIN: a program that is a little too large takes much longer
# to compile, since the compiler tries to make it smaller.
_FAR_RATIO, _FAR_MARGIN = 2, 0.1


def largest(step: Step, busy: Busy) -> Step:
  """Searches for the largest microbatch that fits on a device.

  The number of microbatches is that of the configuration, since the gradients
  of several take memory too.

  Memory is nearly proportional to clips: the first compilation gives a line
  through the memory of the state, the second one near the limit another line
  whose end is compiled if it is a sixteenth further. So a step takes two or
  three compilations, whatever its size, and few that do not fit.

  Args:
    step: compiled step of the configuration, which fits.
    busy: see `compile_step`.
  """
  available = step.topology.memory_bytes
  # A batch is a multiple of the clips that are drawn together.
  data = step.config.data
  together = data.clips_per_record * data.draws_per_unit
  # Clips at once -> bytes needed, of what has been compiled.
  needed = {
    0: sum(step.state_bytes.values()),
    step.clips_at_once: step.needed_bytes,
  }
  best, too_many = step, None
  clips = guess(needed, available)
  for _ in range(_MAX_TRIES):
    least = best.clips_at_once
    if too_many is not None and not least < clips < too_many:
      clips = (least + too_many) // 2
    clips -= clips % together
    if clips - least <= least // 16:
      break
    changes = {
      "batch_size": clips * step.num_shards * step.num_microbatches,
      "clips_per_device": clips,
    }
    tried = compile_step(
      with_changes(step.config, changes), step.topology, busy, step.stage
    )
    needed[clips] = tried.needed_bytes
    if tried.fits:
      best = tried
    else:
      too_many = clips
    clips = guess(needed, available)
  return best


def guess(needed: dict[int, int], available: int) -> int:
  """Returns clips that fit, by the line through the two nearest points.

  Args:
    needed: bytes by clips of what has been compiled, and of no clip.
    available: bytes of a device.
  """

  (a, at_a), (b, at_b) = sorted(
    sorted(needed.items(), key=lambda item: abs(item[1] - available))[:2]
  )
  slope = max((at_b - at_a) / (b - a), 1)
  clips = a + (available - at_a) / slope
  if clips > _FAR_RATIO * max(needed):
    clips *= 1 - _FAR_MARGIN
  # Multiples of 8 fill the tiles of matrices, from where that is fine enough.
  return int(clips) // 8 * 8 if clips >= 128 else int(clips)


def remedies(step: Step) -> Iterator[dict[str, Any]]:
  """Yields changes that may make a configuration fit, the cheapest first.

  Each change is complete in itself. Changes that cannot save enough are left
  out.
  """
  config, available = step.config, step.topology.memory_bytes
  state = sum(step.state_bytes.values())
  # Slices exchange no weights.
  num_slices = step.topology.num_slices
  spread = {
    "mesh.data": num_slices,
    "mesh.fsdp": step.num_shards // num_slices,
  }
  fewest = step.fewest_at_once
  least_memory = {"remat": "full", "scan": True}
  candidates = []
  if state < available:
    # Activations are proportional to the clips processed at once.
    excess = (step.needed_bytes - state) / (available - state)
    clips = int(0.9 * step.clips_at_once / excess)
    fewer = {"clips_per_device": max(clips, fewest)}
    if excess < 3 and config.remat == "none":
      candidates.append({"remat": "dots"})
    if excess < 8:
      candidates.append(least_memory)
    candidates += [fewer, least_memory | fewer]
  candidates += [
    spread,
    least_memory | spread,
    least_memory | spread | {"clips_per_device": fewest},
  ]
  current = flat(config) | {
    "clips_per_device": step.clips_at_once,
    **{f"mesh.{axis}": size for axis, size in step.mesh.items()},
  }
  seen = [{}]
  for changes in candidates:
    changes = {k: v for k, v in changes.items() if current[k] != v}
    if changes not in seen:
      seen.append(changes)
      yield changes
