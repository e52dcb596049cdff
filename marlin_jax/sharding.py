"""The device mesh, and where arrays live on it."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Clips are spread over this axis; parameters are copied to every device.
DATA_AXIS = "data"


def make_mesh(num_data: int, devices: Sequence[jax.Device] | None = None):
  """A mesh with one data axis.

  Args:
    num_data: devices along the axis; -1 takes all there are.
    devices: the devices to use; all of the process group by default.

  Raises:
    ValueError: more devices are asked for than there are.
  """
  devices = list(devices if devices is not None else jax.devices())
  if num_data == -1:
    num_data = len(devices)
  if num_data != len(devices):
    kinds = sorted({d.device_kind for d in devices})
    raise ValueError(
      f"config.mesh.data={num_data}, but there are {len(devices)} devices "
      f"({', '.join(kinds)}); use -1 for all of them"
    )
  return Mesh(np.asarray(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Leading axis over the data axis."""
  return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())
