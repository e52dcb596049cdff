"""Roofline model: the least time of a step on given chips.

Every resource works at its published peak, all at the same time (Williams et
al. 2009). Real steps are slower.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from marlin_jax.devices.chips import Chip
from marlin_jax.planning.hlo import Collective


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Least seconds per step of each resource.

  Attributes:
    compute: seconds for the matrix products, recomputation by remat included.
    hbm: seconds for the bytes to and from the chip's memory.
    links: seconds for the bytes between chips of a slice or machine.
    network: seconds for the bytes between slices or machines; None if the
      network's speed is unknown.
  """

  compute: float
  hbm: float
  links: float
  network: float | None

  @property
  def secs(self) -> float:
    return max(self._times.values())

  @property
  def binds(self) -> str:
    """The resource that takes longest, which bounds the step."""
    return max(self._times, key=self._times.get)

  @property
  def _times(self) -> dict[str, float]:
    return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


def estimate(
  chip: Chip,
  peak_flops: float,
  *,
  flops: float,
  hbm_bytes: float,
  collectives: Sequence[Collective],
  network_bytes: float = 0.0,
) -> Roofline:
  """Returns the least time of a step: its work divided by the chip's peaks.

  Args:
    chip: the chip.
    peak_flops: its peak FLOP/s in the precision of the matrix products.
    flops: FLOPs of one chip in one step.
    hbm_bytes: bytes to and from the memory of one chip in one step.
    collectives: collectives of the step, see hlo.collectives.
    network_bytes: bytes that one chip sends to other slices in one step, beside
      those of the collectives.
  """
  sent = sum(_sent_bytes(c)[0] for c in collectives)
  network_bytes += sum(_sent_bytes(c)[1] for c in collectives)
  network = 0.0
  if network_bytes:
    speed = chip.network_bandwidth
    network = network_bytes / speed if speed else None
  return Roofline(
    compute=flops / peak_flops,
    hbm=hbm_bytes / chip.hbm_bandwidth,
    links=sent / chip.link_bandwidth,
    network=network,
  )


def _sent_bytes(collective: Collective) -> tuple[float, float]:
  """Returns the bytes that one device of a ring sends: by link, by network.

  The devices of a machine exchange first; then each exchanges its part with its
  counterparts in the other machines.
  """
  rounds = 2 if collective.kind == "all-reduce" else 1
  num_bytes = rounds * collective.num_bytes * collective.times
  num_nodes = collective.num_nodes
  per_node = collective.group_size // num_nodes
  return (
    num_bytes * (per_node - 1) / per_node,
    num_bytes / per_node * (num_nodes - 1) / num_nodes,
  )
