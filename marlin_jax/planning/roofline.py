"""The least time that a step can take on given chips.

A roofline (Williams et al. 2009): each resource at its full published speed,
and all of them busy at the same time. Real steps are slower.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from marlin_jax.devices.chips import Chip
from marlin_jax.planning.hlo import Collective


@dataclasses.dataclass(frozen=True)
class Roofline:
  """Least seconds per step, by resource.

  Attributes:
    compute: matrix products, with what remat repeats.
    hbm: bytes to and from the chip's memory.
    links: bytes between chips of a slice or machine.
    network: bytes between slices; None: the network's speed is not known.
  """

  compute: float
  hbm: float
  links: float
  network: float | None

  @property
  def secs(self) -> float:
    return max(self._known.values())

  @property
  def binds(self) -> str:
    """The resource that takes longest."""
    return max(self._known, key=self._known.get)

  @property
  def _known(self) -> dict[str, float]:
    return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


def estimate(
  chip: Chip,
  dtype: str,
  *,
  flops: float,
  hbm_bytes: float,
  collectives: Sequence[Collective],
  network_bytes: float = 0.0,
) -> Roofline:
  """Divides what a step needs of each chip by what the chip has.

  Args:
    chip: the chip.
    dtype: of the matmuls.
    flops: of one chip in one step.
    hbm_bytes: likewise.
    collectives: of the step, see hlo.collectives.
    network_bytes: that one chip sends to other slices.
  """
  sent = sum(_sent(one) for one in collectives)
  network = 0.0
  if network_bytes:
    speed = chip.network_bandwidth
    network = network_bytes / speed if speed else None
  return Roofline(
    compute=flops / chip.peak_flops(dtype),
    hbm=hbm_bytes / chip.hbm_bandwidth,
    links=sent / chip.link_bandwidth,
    network=network,
  )


def _sent(one: Collective) -> float:
  """Bytes that one device of a ring sends."""
  rounds = 2 if one.kind == "all-reduce" else 1
  n = one.group_size
  return rounds * one.num_bytes * one.times * (n - 1) / n
