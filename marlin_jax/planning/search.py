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
_MAX_TRIES = 5


def largest(step: Step, busy: Busy) -> Step | None:
  """Searches for the largest microbatch that fits on a device.

  Each guess extrapolates linearly from the memory of the steps compiled so far.
  The search stops if the next guess differs by less than a sixteenth, or after
  _MAX_TRIES.

  Args:
    step: compiled step of the configuration.
    busy: see `compile_step`.

  Returns:
    The largest step that fits; None if there is none.
  """
  available = step.topology.memory_bytes
  # Clips at once -> bytes needed, of what has been compiled.
  needed = {0: sum(step.state_bytes.values())}
  best, too_many = None, None
  clips = step.clips_at_once
  if step.num_microbatches == 1:
    needed[clips] = step.needed_bytes
    best, too_many = (step, None) if step.fits else (None, clips)
    clips = _guess(needed, available)
  for _ in range(_MAX_TRIES):
    least = best.clips_at_once if best else 0
    if too_many is not None and not least < clips < too_many:
      clips = (least + too_many) // 2
    if clips - least <= least // 16:
      break
    changes = {
      "batch_size": clips * step.num_shards,
      "clips_per_device": clips,
    }
    tried = compile_step(
      with_changes(step.config, changes), step.topology, busy
    )
    needed[clips] = tried.needed_bytes
    if tried.fits:
      best = tried
    else:
      too_many = clips
    clips = _guess(needed, available)
  return best


def _guess(needed: dict[int, int], available: int) -> int:
  """Returns clips that fit, by the line through the two nearest points."""
  (a, at_a), (b, at_b) = sorted(
    sorted(needed.items(), key=lambda item: abs(item[1] - available))[:2]
  )
  slope = max((at_b - at_a) / (b - a), 1)
  return int(a + (available - at_a) / slope)


def remedies(step: Step) -> Iterator[dict[str, Any]]:
  """Yields changes that may make a configuration fit, the cheapest first.

  Each change is complete in itself. Changes that cannot save enough are left
  out.
  """
  config, available = step.config, step.topology.memory_bytes
  state = sum(step.state_bytes.values())
  spread = {"mesh.data": 1, "mesh.fsdp": step.num_shards}
  least_memory = {"remat": "full", "scan": True}
  candidates = []
  if state < available:
    # Activations are proportional to the clips processed at once.
    excess = (step.needed_bytes - state) / (available - state)
    fewer = {"clips_per_device": max(int(0.9 * step.clips_at_once / excess), 1)}
    if excess < 3 and config.remat == "none":
      candidates.append({"remat": "dots"})
    if excess < 8:
      candidates.append(least_memory)
    candidates += [fewer, least_memory | fewer]
  candidates += [
    spread,
    least_memory | spread,
    least_memory | spread | {"clips_per_device": 1},
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
