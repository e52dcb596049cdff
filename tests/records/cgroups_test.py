"""Cores and memory are those of the container, not of its host."""

from pathlib import Path

import pytest

from marlin_jax.records import cgroups, cli

GIB = 1 << 30


def write(root: Path, files: dict[str, str]) -> tuple[Path, Path]:
  """Writes a tree of control groups; returns the mount and the membership."""
  for name, text in files.items():
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")
  return root / "mount", root / "membership"


TREES = {
  "version 2, in a container": (
    {
      "membership": "0::/",
      "mount/cpu.max": "400000 100000",
      "mount/memory.max": str(16 * GIB),
    },
    4,
    16 * GIB,
  ),
  "version 2, the group above is narrower": (
    {
      "membership": "0::/pods/one/box",
      "mount/pods/one/box/cpu.max": "max 100000",
      "mount/pods/one/cpu.max": "150000 100000",
      "mount/pods/cpu.max": "6400000 100000",
      "mount/pods/one/box/memory.max": "max",
      "mount/pods/memory.max": str(64 * GIB),
      "mount/pods/one/memory.max": str(8 * GIB),
    },
    2,
    8 * GIB,
  ),
  "version 2, memory.high": (
    {
      "membership": "0::/",
      "mount/memory.high": str(GIB),
      "mount/memory.max": "max",
    },
    None,
    GIB,
  ),
  "version 1, in a container": (
    {
      "membership": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc",
      "mount/cpu/cpu.cfs_quota_us": "50000",
      "mount/cpu/cpu.cfs_period_us": "100000",
      "mount/memory/memory.limit_in_bytes": str(2 * GIB),
    },
    1,
    2 * GIB,
  ),
  "version 1, on the host": (
    {
      "membership": "5:cpu,cpuacct:/jobs/abc\n4:memory:/jobs/abc",
      "mount/cpu,cpuacct/jobs/abc/cpu.cfs_quota_us": "300000",
      "mount/cpu,cpuacct/jobs/abc/cpu.cfs_period_us": "100000",
      "mount/memory/jobs/abc/memory.limit_in_bytes": str(3 * GIB),
    },
    3,
    3 * GIB,
  ),
  "no limit": (
    {
      "membership": "0::/\n5:cpu:/\n4:memory:/",
      "mount/cpu.max": "max 100000",
      "mount/memory.max": "max",
      "mount/cpu/cpu.cfs_quota_us": "-1",
      "mount/cpu/cpu.cfs_period_us": "100000",
      "mount/memory/memory.limit_in_bytes": "9223372036854771712",
    },
    None,
    None,
  ),
  "nothing to read": ({}, None, None),
  "garbage": (
    {"membership": "0::/../..", "mount/cpu.max": "", "mount/memory.max": "x"},
    None,
    None,
  ),
}


@pytest.mark.parametrize("name", TREES)
def test_limits_are_read(name, tmp_path):
  files, cores, memory = TREES[name]
  tree = write(tmp_path, files)
  assert cgroups.core_limit(*tree) == cores
  assert cgroups.memory_limit(*tree) == memory


def test_cores_and_memory_obey_the_limits(monkeypatch):
  without = cli.num_cores(), cgroups.usable_memory()
  monkeypatch.setattr(cgroups, "core_limit", lambda: 1)
  monkeypatch.setattr(cgroups, "memory_limit", lambda: GIB // 2)
  assert (cli.num_cores(), cgroups.usable_memory()) == (1, GIB // 2)
  monkeypatch.setattr(cgroups, "core_limit", lambda: 10**6)
  monkeypatch.setattr(cgroups, "memory_limit", lambda: 1 << 55)
  assert cli.num_cores() >= without[0]
  assert cgroups.usable_memory() >= without[1]
