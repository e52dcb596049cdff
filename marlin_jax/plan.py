r"""Tells what a training needs before the devices are rented.

  python -m marlin_jax.plan --config=configs/pretrain_b.py --topology=v5e:4x4

compiles the real training step for devices that need not be there, and prints
what it takes of each: memory, arithmetic, bytes exchanged, and the least time.
Any value of the configuration can be overridden, as in training:

  python -m marlin_jax.plan --config=configs/pretrain_l.py --topology=v5e:4x4 \
    --config.batch_size=128 --config.dtype=bfloat16 --config.mesh.fsdp=16
  python -m marlin_jax.plan --config=configs/pretrain_b.py --topology=cpu:8
  python -m marlin_jax.plan --config=configs/quickstart.py --topology=here \
    --nosearch --json=plan.json

It needs no data set, and for TPU no TPU but libtpu:
pip install 'marlin-jax[plan]'. A configuration that does not fit ends it with
status 1, after changes that would make it fit, each compiled and found to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import threading
import time
from pathlib import Path

from absl import app, flags, logging

from marlin_jax.devices import xla_flags
from marlin_jax.planning import topology
from marlin_jax.pretraining.configuration import validate
from marlin_jax.records.cli import UserError
from marlin_jax.training import config_flags

flags.declare_key_flag("config")
_TOPOLOGY = flags.DEFINE_string(
  "topology", "here", f"The devices:\n{topology.FORMS}"
)
_NUM_SLICES = flags.DEFINE_integer(
  "num_slices", 1, "So many TPU slices of that shape.", lower_bound=1
)
_SEARCH = flags.DEFINE_boolean(
  "search",
  True,
  "Compile a few more times, for the most clips that fit, or for what would "
  "make the configuration fit.",
)
_JSON = flags.DEFINE_string(
  "json", None, "Write the numbers to this file too; '-': to stdout instead."
)

# What trainers of ViTs have reached of the chip's peak (26-39%).
_USUAL_SHARE = 0.35
_GIB = 2**30


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
  xla_flags.set_for_training()
  logging.set_verbosity(logging.WARNING)
  try:
    report, fits = plan(config_flags.CONFIG.value)
  except UserError as e:
    sys.exit(f"error: {e}")
  text = json.dumps(report, indent=2)
  if _JSON.value == "-":
    print(text)
  elif _JSON.value:
    Path(_JSON.value).write_text(text + "\n")
  if not fits:
    sys.exit(1)


def plan(config):
  """Plans, and prints unless the numbers go to stdout.

  Returns:
    The numbers, ready for JSON, and whether the configuration fits.

  Raises:
    ConfigError, TopologyError: see `step_plan.compile_step` and
      `topology.find_devices`.
  """
  validate(config)
  say = (lambda text: None) if _JSON.value == "-" else print

  # --- Devices ----------------------------------------------------------------
  devices = topology.find_devices(_TOPOLOGY.value, _NUM_SLICES.value)
  # Only now: what jax may use is settled when it is first asked.
  from marlin_jax.planning import compiled_step, search

  # --- The step ---------------------------------------------------------------
  step = compiled_step.compile_step(config, devices, busy)
  say(_text(step))
  report = _numbers(step)

  # --- Others -----------------------------------------------------------------
  if _SEARCH.value and step.fits:
    best = search.largest(step, busy)
    if best:
      say(_largest_text(step, best))
      report["largest"] = _numbers(best)
  elif _SEARCH.value:
    report["remedies"] = []
    for changes in search.remedies(step):
      tried = compiled_step.compile_step(
        compiled_step.with_changes(config, changes), devices, busy
      )
      say(_remedy_text(changes, tried))
      report["remedies"].append({"changes": changes} | _numbers(tried))
      if tried.fits:
        break
    else:
      say("nothing that was tried makes it fit: take more or larger chips")
  return report, step.fits


@contextlib.contextmanager
def busy(what: str):
  """Tells on stderr what goes on, and every half minute that it still does."""
  start = time.perf_counter()
  done = threading.Event()

  def tell():
    while not done.wait(30):
      secs = time.perf_counter() - start
      print(f"{what}: {secs:.0f} s so far", file=sys.stderr, flush=True)

  print(f"{what} ...", file=sys.stderr, flush=True)
  teller = threading.Thread(target=tell, daemon=True)
  teller.start()
  try:
    yield
  finally:
    done.set()
    teller.join()


# --- text ---------------------------------------------------------------------


def _text(step) -> str:
  config, devices = step.config, step.topology
  first = devices.devices[0]
  kind = devices.chip.name if devices.chip else first.device_kind
  sizes = ", ".join(f"{k} {v}" for k, v in step.mesh.items())
  lines = [
    f"network  {step.num_params / 1e6:.1f}M parameters, {config.dtype}, remat "
    f"{config.remat}, scan {config.scan}, attention {config.attention}",
    f"devices  {len(devices.devices)} x {kind} of {devices.num_hosts} host(s)"
    + (f" in {devices.num_slices} slices" if devices.num_slices > 1 else "")
    + f"; mesh {sizes}",
    f"batch    {config.batch_size} clips, "
    f"{config.batch_size / step.num_shards:g} per device: {_parts_text(step)}",
    f"compile  {step.compile_secs:.1f} s, after {step.trace_secs:.1f} s of "
    "tracing",
    "",
    *_memory_lines(step),
  ]
  if step.memory:
    lines += ["", *_exchange_lines(step), "", *_rate_lines(step)]
  return "\n".join(lines)


def _parts_text(step) -> str:
  text = f"{step.clips_at_once} at once in {step.num_microbatches} part(s)"
  if (
    step.config.clips_per_device
    and step.default_microbatches != step.num_microbatches
  ):
    text += (
      f", as clips_per_device says; left alone training would take "
      f"{step.default_microbatches}"
    )
  return text


def _memory_lines(step) -> list[str]:
  there, needed = step.topology.memory_bytes, step.needed_bytes
  lines = ["memory of each device, GiB"]
  rows = {f"  {name}": size for name, size in step.state_bytes.items()}
  if step.memory:
    found = step.memory
    rows = {
      "arguments": found.arguments,
      **rows,
      "outputs": found.outputs - found.reused,
      "temporaries": found.temporaries,
      "program": found.code,
    }
  lines += [f"  {k:14}{v / _GIB:8.3f}" for k, v in rows.items()]
  if step.fits:
    verdict = f"fits, {(there - needed) / _GIB:.2f} to spare"
  else:
    verdict = f"does not fit by {(needed - there) / _GIB:.2f}"
  lines.append(
    f"  {'all':14}{needed / _GIB:8.3f} of {there / _GIB:.2f}: {verdict}"
  )
  if not step.memory:
    lines.append("  the compiler refused it")
  return lines


def _exchange_lines(step) -> list[str]:
  lines = ["exchanged per step"]
  for row in _collective_rows(step):
    lines.append(
      f"  {row['kind']:19}{row['count']:5} x, {row['bytes'] / 1e6:.1f} MB, "
      f"among {row['devices']} devices"
    )
  return lines if len(lines) > 1 else ["exchanged per step: nothing"]


def _collective_rows(step) -> list[dict]:
  rows = {}
  for one in step.collectives:
    row = rows.setdefault((one.kind, one.group_size), [0, 0])
    row[0] += one.times
    row[1] += one.times * one.num_bytes
  return [
    {"kind": kind, "devices": n, "count": count, "bytes": size}
    for (kind, n), (count, size) in sorted(rows.items())
  ]


def _rate_lines(step) -> list[str]:
  rate = _rate(step)
  per_clip = rate["flops_per_clip"]
  lines = [
    f"arithmetic  {per_clip / 1e9:.1f} GFLOP per clip, "
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
    f"rate        at most {rate['clips_per_sec']:.0f} clips/s, with all at "
    "their published peaks at once;",
    f"            {rate['usual_clips_per_sec']:.0f} where no more than "
    f"{_USUAL_SHARE:.0%} of peak arithmetic is reached, as good trainers of "
    "ViTs do",
    f"input       at that most, uint8: {to_device:.0f} MB/s to each device, "
    f"{to_host:.2f} GB/s to each host",
  ]


def _largest_text(step, best) -> str:
  text = (
    f"\nlargest     {best.clips_at_once} clips per device at once: "
    f"{best.needed_bytes / _GIB:.2f} of "
    f"{best.topology.memory_bytes / _GIB:.2f} GiB, with "
    f"--config.batch_size={best.config.batch_size} "
    f"--config.clips_per_device={best.clips_at_once}"
  )
  if step.num_microbatches > 1 and best.clips_at_once > step.clips_at_once:
    text += (
      "\n            more than training dares: fewer parts are faster; set "
      "clips_per_device"
    )
  return text


def _remedy_text(changes, tried) -> str:
  names = " ".join(f"--config.{k}={v}" for k, v in changes.items())
  verdict = "fits" if tried.fits else "does not fit either"
  return (
    f"with {names}: {tried.needed_bytes / _GIB:.2f} of "
    f"{tried.topology.memory_bytes / _GIB:.2f} GiB, {verdict}"
  )


# --- numbers ------------------------------------------------------------------


def _rate(step) -> dict:
  """Arithmetic, least times and what they ask of the input."""
  from marlin_jax.pretraining import flops

  config, devices = step.config, step.topology
  rate = {
    "flops_per_clip": flops.train_step(config, step.num_microbatches),
    "flops_per_clip_repeated_by_remat": flops.repeated_by_remat(config),
    "flops_per_device": step.flops_per_device,
    "hbm_bytes_per_device": step.hbm_bytes,
  }
  roof = step.roofline()
  if roof is None:
    return rate
  usual_secs = max(roof.secs, roof.compute / _USUAL_SHARE)
  num_devices, num_hosts = len(devices.devices), devices.num_hosts
  clips_per_sec = config.batch_size / roof.secs
  input_rate = clips_per_sec * step.clip_bytes
  return rate | {
    "least_secs": dataclasses.asdict(roof),
    "binds": roof.binds,
    "step_secs": roof.secs,
    "clips_per_sec": clips_per_sec,
    "usual_clips_per_sec": config.batch_size / usual_secs,
    "input_bytes_per_sec_per_device": input_rate / num_devices,
    "input_bytes_per_sec_per_host": input_rate / num_hosts,
  }


def _numbers(step) -> dict:
  """All of a step, ready for JSON."""
  from marlin_jax.training.configuration import flat

  devices = step.topology
  return {
    "config": flat(step.config),
    "topology": devices.name,
    "num_devices": len(devices.devices),
    "num_hosts": devices.num_hosts,
    "num_slices": devices.num_slices,
    "device_kind": devices.devices[0].device_kind,
    "mesh": step.mesh,
    "num_params": step.num_params,
    "num_parts": step.num_microbatches,
    "num_parts_training_chooses": step.default_microbatches,
    "clips_at_once": step.clips_at_once,
    "fits": step.fits,
    "memory_bytes": devices.memory_bytes,
    "needed_bytes": step.needed_bytes,
    "state_bytes": step.state_bytes,
    "memory": dataclasses.asdict(step.memory) if step.memory else None,
    "collectives": _collective_rows(step),
    "rate": _rate(step),
    "trace_secs": step.trace_secs,
    "compile_secs": step.compile_secs,
  }


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main, flags_parser=config_flags.parse)
