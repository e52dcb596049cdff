"""Compiled steps as text for the terminal and as numbers for JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from marlin_jax.devices.chips import gpu_memory_fraction
from marlin_jax.planning.compiled_step import Step
from marlin_jax.pretraining.configuration import stages
from marlin_jax.records.cli import counted
from marlin_jax.training.configuration import flat

# Share of the chip's peak arithmetic that trainers of ViTs reach: 26-39 %.
_USUAL_SHARE = 0.35
_GIB = 2**30
# Measured, see docs/PERFORMANCE.md: frames that a core reads and decodes, 350
# clips of 16 of them, and the most clips that threads of one process can, since
# Python runs one at a time.
_FRAMES_PER_SEC_OF_CORE = 350 * 16
_CLIPS_PER_SEC_OF_THREADS = 2_000


# --- text ---------------------------------------------------------------------


def step_text(step: Step) -> str:
  """Describes a step: network, devices, memory, communication, rate."""
  config, topology = step.config, step.topology
  first = topology.devices[0]
  kind = topology.chip.name if topology.chip else first.device_kind
  sizes = ", ".join(f"{axis} {size}" for axis, size in step.mesh.items())
  slices = (
    f" in {topology.num_slices} slices" if topology.num_slices > 1 else ""
  )
  lines = [
    f"network  {step.num_params / 1e6:.1f}M parameters, {config.dtype}, remat "
    f"{config.remat}, scan {config.scan}, attention {config.attention}",
    f"devices  {len(topology.devices)} x {kind} of "
    f"{counted(topology.num_hosts, 'host')}{slices}; mesh {sizes}",
    f"batch    {config.batch_size} clips, "
    f"{config.batch_size / step.num_shards:g} per device: "
    f"{_microbatches_text(step)}",
    f"compile  {step.compile_secs:.1f} s, after {step.trace_secs:.1f} s of "
    "tracing",
    "",
    *_memory_lines(step),
  ]
  if any(step.fused_attention.values()):
    forward, backward = step.fused_attention.values()
    lines[3:3] = [
      f"attention {forward} fused calls forward, {backward} backward, per step"
    ]
  if step.memory:
    lines += ["", *_communication_lines(step), "", *_rate_lines(step)]
  return "\n".join(lines)


def stages_text(steps: Sequence[Step]) -> str:
  """Describes the steps of all stages of a curriculum, a line for each."""
  lines = []
  for step in steps:
    rate = _rate(step)
    speed = (
      f", at most {rate['clips_per_sec']:.0f} clips/s"
      if "clips_per_sec" in rate
      else ""
    )
    verdict = "fits" if step.fits else "does not fit"
    lines.append(
      f"stage {step.stage + 1} of {step.num_stages}: {step.clips}; "
      f"{step.needed_bytes / _GIB:.2f} GiB, {verdict}; "
      f"{step.flops_per_clip / 1e9:.1f} GFLOP per clip{speed}"
    )
  return "\n".join(lines)


def _microbatches_text(step: Step) -> str:
  text = (
    f"{step.clips_at_once} at once in "
    f"{counted(step.num_microbatches, 'microbatch')}"
  )
  default = step.default_microbatches
  if step.config.clips_per_device and default != step.num_microbatches:
    text += f", set by clips_per_device; the default is {default}"
  return text


def _memory_lines(step: Step) -> list[str]:
  available, needed = step.topology.memory_bytes, step.needed_bytes
  lines = ["memory of each device, GiB"]
  rows = {f"  {name}": size for name, size in step.state_bytes.items()}
  if step.memory:
    memory = step.memory
    rows = {
      "arguments": memory.arguments,
      **rows,
      "outputs": memory.outputs - memory.reused,
      "temporaries": memory.temporaries,
      "program": memory.code,
    }
  lines += [f"  {name:14}{size / _GIB:8.3f}" for name, size in rows.items()]
  if step.fits:
    verdict = f"fits, {(available - needed) / _GIB:.2f} to spare"
  else:
    verdict = f"does not fit by {(needed - available) / _GIB:.2f}"
  lines.append(
    f"  {'all':14}{needed / _GIB:8.3f} of {available / _GIB:.2f}: {verdict}"
  )
  if step.topology.gpus_per_node:
    lines.append(
      f"  jax allocates {gpu_memory_fraction():.0%} of a GPU for programs; "
      "XLA_CLIENT_MEM_FRACTION changes it"
    )
  if step.rematerialised:
    lines.append(
      f"  {step.rematerialised} operations are computed twice, which the "
      "compiler added to save memory: a smaller batch may be faster"
    )
  if not step.memory:
    lines.append("  the compiler refused it")
  return lines


def _communication_lines(step: Step) -> list[str]:
  rows = _collective_rows(step)
  if not rows:
    return ["exchanged per step: nothing"]
  return [
    "exchanged per step",
    *(
      f"  {row['kind']:19}{row['count']:5} x, {row['bytes'] / 1e6:.1f} MB, "
      f"among {row['devices']} devices"
      for row in rows
    ),
  ]


def _rate_lines(step: Step) -> list[str]:
  rate = _rate(step)
  lines = [
    f"arithmetic  {rate['flops_per_clip'] / 1e9:.1f} GFLOP per clip, "
    f"{rate['flops_per_device'] / 1e12:.2f} TFLOP per device and step",
  ]
  if not step.topology.chip:
    kind = step.topology.devices[0].device_kind
    return [*lines, f"no estimate of the rate: the peak of {kind} is not known"]
  shown = ", ".join(
    f"{name} {1e3 * secs:.1f}" if secs is not None else f"{name} not known"
    for name, secs in rate["least_secs"].items()
  )
  to_device = rate["input_bytes_per_sec_per_device"] / 1e6
  to_host = rate["input_bytes_per_sec_per_host"] / 1e9
  return [
    *lines,
    f"least time  {1e3 * rate['step_secs']:.1f} ms per step; {rate['binds']} "
    f"binds (ms: {shown})",
    f"rate        at most {rate['clips_per_sec']:.0f} clips/s, with every "
    "resource at its published peak;",
    f"            {rate['usual_clips_per_sec']:.0f} at up to "
    f"{_USUAL_SHARE:.0%} of peak arithmetic, which good trainers of ViTs reach",
    f"input       at the highest rate, uint8: {to_device:.0f} MB/s to each "
    f"device, {to_host:.2f} GB/s to each host;",
    *_reading_lines(step, rate),
  ]


def _reading_lines(step: Step, rate: dict[str, Any]) -> list[str]:
  """Compares the clips that a host must read with what was measured."""
  per_host = rate["input_clips_per_sec_per_host"]
  lines = [
    f"            {per_host:.0f} clips/s of each host: "
    f"{rate['input_cores_per_host']:.0f} cores that read and decode, as "
    "measured (docs/PERFORMANCE.md)",
  ]
  if step.config.data.num_workers == 0 and per_host > _CLIPS_PER_SEC_OF_THREADS:
    lines.append(
      f"            threads of one process read at most "
      f"{_CLIPS_PER_SEC_OF_THREADS} clips/s: set data.num_workers=-1"
    )
  return lines


def largest_text(step: Step, best: Step) -> str:
  """Describes the largest batch that fits.

  Args:
    step: step of the configuration.
    best: result of `search.largest`.
  """
  text = (
    f"\nlargest     {best.clips_at_once} clips per device at once: "
    f"{best.needed_bytes / _GIB:.2f} of "
    f"{best.topology.memory_bytes / _GIB:.2f} GiB, with "
    f"--config.batch_size={best.config.batch_size} "
    f"--config.clips_per_device={best.clips_at_once}"
  )
  if step.num_microbatches > 1 and best.clips_at_once > step.clips_at_once:
    text += "\n            set clips_per_device: fewer microbatches are faster"
  return text


def remedy_text(changes: dict[str, Any], tried: Step) -> str:
  """Describes a step with other values of the configuration."""
  values = " ".join(f"--config.{key}={value}" for key, value in changes.items())
  verdict = "fits" if tried.fits else "does not fit either"
  return (
    f"with {values}: {tried.needed_bytes / _GIB:.2f} of "
    f"{tried.topology.memory_bytes / _GIB:.2f} GiB, {verdict}"
  )


# --- numbers ------------------------------------------------------------------


def numbers(step: Step) -> dict[str, Any]:
  """Returns everything about a step as JSON values."""
  topology = step.topology
  return {
    "config": flat(step.config),
    "clips": step.clips,
    "topology": topology.name,
    "num_devices": len(topology.devices),
    "num_hosts": topology.num_hosts,
    "num_slices": topology.num_slices,
    "device_kind": topology.devices[0].device_kind,
    "mesh": step.mesh,
    "num_params": step.num_params,
    "num_parts": step.num_microbatches,
    "num_parts_training_chooses": step.default_microbatches,
    "clips_at_once": step.clips_at_once,
    "fits": step.fits,
    "memory_bytes": topology.memory_bytes,
    "needed_bytes": step.needed_bytes,
    "state_bytes": step.state_bytes,
    "memory": dataclasses.asdict(step.memory) if step.memory else None,
    "collectives": _collective_rows(step),
    "fused_attention": step.fused_attention,
    "rematerialised": step.rematerialised,
    "rate": _rate(step),
    "trace_secs": step.trace_secs,
    "compile_secs": step.compile_secs,
  }


def _collective_rows(step: Step) -> list[dict[str, Any]]:
  """Sums the collectives of each kind and group size."""
  rows = {}
  for collective in step.collectives:
    row = rows.setdefault((collective.kind, collective.group_size), [0, 0])
    row[0] += collective.times
    row[1] += collective.times * collective.num_bytes
  return [
    {"kind": kind, "devices": n, "count": count, "bytes": size}
    for (kind, n), (count, size) in sorted(rows.items())
  ]


def _rate(step: Step) -> dict[str, Any]:
  """Returns arithmetic, least times, and the input rate that they require."""
  config = step.config
  rate = {
    "flops_per_clip": step.flops_per_clip,
    "flops_per_clip_repeated_by_remat": step.repeated_flops_per_clip,
    "flops_per_device": step.flops_per_device,
    "hbm_bytes_per_device": step.hbm_bytes,
  }
  roofline = step.roofline()
  if roofline is None:
    return rate
  usual_secs = max(roofline.secs, roofline.compute / _USUAL_SHARE)
  clips_per_sec = config.batch_size / roofline.secs
  per_shard = clips_per_sec / step.num_shards
  per_host = per_shard * step.shards_per_host
  num_frames = stages(config)[step.stage].config.data.num_frames
  return rate | {
    "least_secs": dataclasses.asdict(roofline),
    "binds": roofline.binds,
    "step_secs": roofline.secs,
    "clips_per_sec": clips_per_sec,
    "usual_clips_per_sec": config.batch_size / usual_secs,
    "input_bytes_per_sec_per_device": per_shard * step.clip_bytes,
    "input_bytes_per_sec_per_host": per_host * step.clip_bytes,
    "input_clips_per_sec_per_host": per_host,
    "input_cores_per_host": per_host * num_frames / _FRAMES_PER_SEC_OF_CORE,
  }
