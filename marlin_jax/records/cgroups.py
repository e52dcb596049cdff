"""Limits that a container sets on cores and memory.

The machine's own numbers are those of the host: a container with 4 of 64 cores
would start 64 workers.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
# Version 1 says that there is no limit by a number near 2^63.
_NO_LIMIT = 1 << 60


def core_limit(
  mount: Path = _MOUNT, membership: Path = _MEMBERSHIP
) -> int | None:
  """Returns the most cores that this process gets, at least 1; None: no limit.

  Args:
    mount: where the control groups are mounted.
    membership: the file that lists the groups of this process.
  """
  limits = []
  for folder in _folders(mount, membership, "cpu"):
    quota, period = -1, 0
    with contextlib.suppress(OSError, ValueError):
      quota, period = map(int, (folder / "cpu.max").read_text().split())
    with contextlib.suppress(OSError, ValueError):
      quota = int((folder / "cpu.cfs_quota_us").read_text())
      period = int((folder / "cpu.cfs_period_us").read_text())
    if quota > 0 and period > 0:
      limits.append(max(math.ceil(quota / period), 1))
  return min(limits, default=None)


def memory_limit(
  mount: Path = _MOUNT, membership: Path = _MEMBERSHIP
) -> int | None:
  """Returns the bytes of memory that this process gets; None: no limit.

  Args:
    mount: see `core_limit`.
    membership: see `core_limit`.
  """
  limits = []
  for folder in _folders(mount, membership, "memory"):
    for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
      with contextlib.suppress(OSError, ValueError):
        limits.append(int((folder / name).read_text()))
  return min((limit for limit in limits if 0 < limit < _NO_LIMIT), default=None)


def usable_memory() -> int:
  """Returns the bytes of memory that this process may use."""
  physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  limit = memory_limit()
  return physical if limit is None else min(physical, limit)


def _folders(mount: Path, membership: Path, controller: str) -> Iterator[Path]:
  """Yields the group of this process and those above it, of both versions."""
  # In a container the path of the group may not be mounted, but the root is.
  groups = {mount, mount / controller}
  with contextlib.suppress(OSError):
    for line in membership.read_text().splitlines():
      _, controllers, group = line.split(":", 2)
      root = mount
      if controllers:
        if controller not in controllers.split(","):
          continue
        root = mount / controllers
        groups.add(mount / controller)
      path = Path(os.path.normpath(group.lstrip("/") or "."))
      for part in (path, *path.parents):
        if ".." not in part.parts:
          groups.update({root / part, mount / controller / part})
  yield from sorted(groups)
