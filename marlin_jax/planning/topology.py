"""Devices to compile for, which need not exist on this machine.

The compilers for TPU (libtpu) and GPU (jax's CUDA plugin) work without such
devices; XLA can emulate any number of CPU devices.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence

from marlin_jax.devices import chips
from marlin_jax.devices.chips import Chip, find
from marlin_jax.planning import gpus
from marlin_jax.planning.gpus import GPUS
from marlin_jax.records.cli import UserError

FORMS = """\
  v5e:4x4    TPU slice by chip and shape: v5e and v6e, two sides up to 16x16;
  v5p:4x4x4  v4 and v5p, three sides
  h200:8     GPUs of one machine: a100, h100, h200, b200
  h200:8x4   8 GPUs in each of 4 machines
  cpu:8      that many CPU devices in this machine's memory
  here       the devices of this machine"""

# Chip -> number of sides of a slice, and the most chips of a slice.
_SLICES = {
  "v4": (3, 4096),
  "v5e": (2, 256),
  "v5p": (3, 6144),
  "v6e": (2, 256),
}
_MAX_NODES = 512
_CUDA_PLUGINS = ("xla_cuda13", "xla_cuda12")
# One device per chip with its two cores; libtpu's default for v4 is two.
_OPTIONS = {"v4": {"chip_config_name": "megacore"}}


class TopologyError(UserError):
  """Devices that do not exist; the message lists those that do."""


@dataclasses.dataclass(frozen=True)
class Topology:
  """Devices and their properties.

  Attributes:
    name: one of FORMS.
    devices: jax devices; those that are not of this machine can only be
      compiled for.
    chip: None if it is not in chips.CHIPS.
    memory_bytes: memory of each device that programs may use.
    num_slices: TPU slices, which are connected by the data centre's network
      alone.
    gpus_per_node: GPUs of a machine, which NVLink connects; None if the devices
      are no GPUs.
  """

  name: str
  devices: Sequence
  chip: Chip | None
  memory_bytes: int
  num_slices: int = 1
  gpus_per_node: int | None = None

  @property
  def num_hosts(self) -> int:
    return len({d.process_index for d in self.devices})


def parse(name: str) -> tuple[str, tuple[int, ...]]:
  """Parses the name of a topology: 'v5e:4x4' -> ('v5e', (4, 4)).

  Checks the shape, because libtpu kills the process for some invalid ones.

  Raises:
    TopologyError: there is no such topology.
  """
  match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
  kind, shape = "", ()
  if name == "here":
    return "here", ()
  if match:
    kind = match[1]
    shape = tuple(int(n) for n in match[2].split("x"))
  if kind == "cpu" and len(shape) == 1 and shape[0] > 0:
    return kind, shape
  if kind in GPUS and 0 not in shape:
    most = GPUS[kind].chip.per_host
    per_node, num_nodes = (*shape, 1)[:2]
    if len(shape) > 2 or per_node > most or num_nodes > _MAX_NODES:
      raise TopologyError(
        f"--topology={name}: a machine has at most {most} {kind}, and there "
        f"are at most {_MAX_NODES} machines, e.g. {kind}:{most}x4"
      )
    return kind, (per_node, num_nodes)
  if kind not in _SLICES or 0 in shape:
    raise TopologyError(f"--topology={name}: expected one of\n{FORMS}")
  num_sides, most = _SLICES[kind]
  if len(shape) != num_sides or math.prod(shape) > most:
    example = "x".join(["4"] * num_sides)
    raise TopologyError(
      f"--topology={name}: a slice of {kind} has {num_sides} sides and at most "
      f"{most} chips, e.g. {kind}:{example}"
    )
  return kind, shape


def find_devices(name: str, num_slices: int = 1) -> Topology:
  """Returns the devices of a topology.

  Call it before jax initialises its devices, which it configures.

  Args:
    name: one of FORMS.
    num_slices: number of slices of a TPU topology.

  Raises:
    TopologyError: there is no such topology, or its compiler is missing.
  """
  kind, shape = parse(name)
  if num_slices > 1 and kind not in _SLICES:
    raise TopologyError(f"--topology={name} has no slices; drop --num_slices")
  if kind in _SLICES:
    return _slices(name, kind, shape, num_slices)
  if kind in GPUS:
    return _nodes(name, kind, *shape)
  import jax

  if kind == "cpu":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", shape[0])
  devices = jax.devices()
  return Topology(
    name,
    devices,
    find(devices[0].device_kind),
    chips.total_bytes(jax.local_devices()[0]),
  )


def has_cuda_plugin() -> bool:
  """Returns True if jax can compile for GPUs."""
  if importlib.util.find_spec("jax_plugins") is None:
    return False
  return any(
    importlib.util.find_spec(f"jax_plugins.{name}") for name in _CUDA_PLUGINS
  )


def _slices(name, kind, shape, num_slices) -> Topology:
  if importlib.util.find_spec("libtpu") is None:
    raise TopologyError(
      f"--topology={name}: compiling for TPU needs libtpu, but no TPU; it is "
      "not installed: pip install 'marlin-jax[plan]', or "
      "pip install 'jax[tpu]'"
    )
  # libtpu must not query the metadata of a machine that is no TPU, and several
  # processes may compile at once.
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{kind}-1")
  import jax
  from jax.experimental import topologies

  jax.config.update("jax_platforms", "cpu")
  options = dict(_OPTIONS.get(kind, {}))
  if math.prod(shape) == 1:
    options["chips_per_host_bounds"] = (1, 1, 1)
  if num_slices > 1:
    options["num_slices"] = num_slices
  try:
    description = topologies.get_topology_desc(
      platform="tpu", topology_name=name, **options
    )
  except jax.errors.JaxRuntimeError as e:
    raise TopologyError(
      f"--topology={name}: unknown to libtpu: {e}\nexpected one of\n{FORMS}"
    ) from e
  devices = description.devices
  chip = find(devices[0].device_kind)
  return Topology(name, devices, chip, chip.hbm_bytes, num_slices)


def _nodes(name, kind, per_node, num_nodes) -> Topology:
  if not has_cuda_plugin():
    raise TopologyError(
      f"--topology={name}: compiling for GPU needs jax's CUDA plugin, but no "
      "GPU; it is not installed: pip install 'marlin-jax[plan-gpu]', or "
      "pip install 'jax[cuda13]'"
    )
  import jax
  from jax.experimental import topologies

  jax.config.update("jax_platforms", "cpu")
  gpu = GPUS[kind]
  description = topologies.get_topology_desc(
    platform="cuda",
    topology_name=name,
    target_config=gpus.target_config(gpu),
    # Slices (connected by NVLink), hosts of each, devices of each.
    topology=f"{num_nodes}x1x{per_node}",
  )
  return Topology(
    name,
    description.devices,
    gpu.chip,
    int(chips.gpu_memory_fraction() * gpu.chip.hbm_bytes),
    gpus_per_node=per_node,
  )
