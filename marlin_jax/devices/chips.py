"""Data sheets of accelerators, and the memory of a device.

Peak rates are dense, without sparsity. Units are decimal unless a name says
GiB.
"""

from __future__ import annotations

import dataclasses
import os

import jax

_GIB = 2**30
# Share of a GPU's memory that jax allocates at start.
_GPU_FRACTION = 0.75
# Share of a device's memory that training may plan with. The rest is for other
# programs and, on CPU, for the input pipeline.
_USABLE = {"cpu": 0.5, "gpu": 0.8, "tpu": 0.9}
# Passes of bfloat16 on TPU, by matmul_precision.
_PASSES = {"default": 1, "high": 3, "highest": 6}


@dataclasses.dataclass(frozen=True)
class Chip:
  """Data sheet of one accelerator; jax counts each as one device.

  Attributes:
    name: display name.
    device_kinds: values of jax.Device.device_kind; library versions differ.
    hbm_bytes: memory that programs may use, a little less than what is sold.
    hbm_bandwidth: memory bandwidth in bytes/s.
    bfloat16: peak FLOP/s of bfloat16 matrix products.
    float32: peak FLOP/s of float32 matrix products at jax's default precision:
      one pass of bfloat16 on TPU, TF32 on GPU.
    link_bandwidth: bytes/s that leave a chip over all its links to other chips
      of its slice (ICI) or machine (NVLink).
    network_bandwidth: bytes/s per chip to other slices or machines; None if not
      published.
    per_host: chips per host.
    plain_float32: peak FLOP/s of float32 without tensor cores, which GPUs use
      for matmul_precision=highest; None on TPUs, which use several bfloat16
      passes instead.
  """

  name: str
  device_kinds: tuple[str, ...]
  hbm_bytes: int
  hbm_bandwidth: float
  bfloat16: float
  float32: float
  link_bandwidth: float
  network_bandwidth: float | None
  per_host: int
  plain_float32: float | None = None

  def peak_flops(self, dtype: str, precision: str = "default") -> float:
    """Returns the peak FLOP/s of matrix products.

    Args:
      dtype: `config.dtype`.
      precision: `config.matmul_precision`, which counts for float32.
    """
    if dtype == "bfloat16":
      return self.bfloat16
    if self.plain_float32 is None:
      return self.float32 / _PASSES[precision]
    return self.plain_float32 if precision == "highest" else self.float32


# TPU: https://docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, read in
# November 2026. Their "ICI bandwidth per chip" counts both directions; older
# revisions give one direction in Gbit/s (v4 2400, v5e 1600, v5p 4800, v6e
# 3200). Memory is the limit that the compiler of libtpu 0.0.42 sets a program.
# GPU: NVIDIA's data sheets, and those of DGX A100, H100, H200 and B200, which
# have one port of 200 or 400 Gbit/s per GPU; NVLink figures there count both
# directions (600, 900, 900 and 1800 GB/s), as do those of PCIe. Memory is what
# the driver reports, or the nominal size of those that plan does not know.
CHIPS = (
  Chip(
    name="TPU v4",  # 275 TFLOP/s, 32 GiB, 1200 GB/s
    device_kinds=("TPU v4",),
    hbm_bytes=int(30.75 * _GIB),
    hbm_bandwidth=1200e9,
    bfloat16=275e12,
    float32=275e12,
    link_bandwidth=300e9,
    network_bandwidth=None,
    per_host=4,
  ),
  Chip(
    name="TPU v5e",  # 197 TFLOP/s, 16 GB, 819 GB/s; 2 x 100 Gbit/s per host
    device_kinds=("TPU v5 lite", "TPU v5e"),
    hbm_bytes=int(15.75 * _GIB),
    hbm_bandwidth=819e9,
    bfloat16=197e12,
    float32=197e12,
    link_bandwidth=200e9,
    network_bandwidth=3.125e9,
    per_host=4,
  ),
  Chip(
    name="TPU v5p",  # 459 TFLOP/s, 95 GiB, 2765 GB/s; 50 Gbit/s per chip
    device_kinds=("TPU v5", "TPU v5p"),
    hbm_bytes=int(95.74 * _GIB),
    hbm_bandwidth=2765e9,
    bfloat16=459e12,
    float32=459e12,
    link_bandwidth=600e9,
    network_bandwidth=6.25e9,
    per_host=4,
  ),
  Chip(
    name="TPU v6e",  # 918 TFLOP/s, 32 GB, 1640 GB/s; 4 x 200 Gbit/s per host
    device_kinds=("TPU v6 lite", "TPU v6e"),
    hbm_bytes=int(31.25 * _GIB),
    hbm_bandwidth=1640e9,
    bfloat16=918e12,
    float32=918e12,
    link_bandwidth=400e9,
    network_bandwidth=12.5e9,
    per_host=4,
  ),
  # One of the two halves of a chip, each a device of its own.
  Chip(
    name="TPU7x",  # chip: 2307 TFLOP/s, 192 GiB, 7380 GB/s; 100 Gbit/s
    device_kinds=("TPU7x",),
    hbm_bytes=96 * _GIB,
    hbm_bandwidth=3690e9,
    bfloat16=1153.5e12,
    float32=1153.5e12,
    link_bandwidth=300e9,
    network_bandwidth=6.25e9,
    per_host=8,
  ),
  Chip(
    name="A100 40GB",
    device_kinds=("NVIDIA A100-SXM4-40GB",),
    hbm_bytes=42_331_013_120,
    hbm_bandwidth=1555e9,
    bfloat16=312e12,
    float32=156e12,
    link_bandwidth=300e9,
    network_bandwidth=25e9,
    per_host=8,
    plain_float32=19.5e12,
  ),
  Chip(
    name="A100 80GB",
    device_kinds=("NVIDIA A100-SXM4-80GB",),
    hbm_bytes=85_100_068_864,
    hbm_bandwidth=2039e9,
    bfloat16=312e12,
    float32=156e12,
    link_bandwidth=300e9,
    network_bandwidth=25e9,
    per_host=8,
    plain_float32=19.5e12,
  ),
  Chip(
    name="A100 80GB PCIe",
    device_kinds=("NVIDIA A100 80GB PCIe",),
    hbm_bytes=85_100_068_864,
    hbm_bandwidth=1935e9,
    bfloat16=312e12,
    float32=156e12,
    link_bandwidth=32e9,
    network_bandwidth=None,
    per_host=8,
    plain_float32=19.5e12,
  ),
  Chip(
    name="H100",
    device_kinds=("NVIDIA H100 80GB HBM3",),
    hbm_bytes=84_942_979_072,
    hbm_bandwidth=3350e9,
    bfloat16=989e12,
    float32=494e12,
    link_bandwidth=450e9,
    network_bandwidth=50e9,
    per_host=8,
    plain_float32=67e12,
  ),
  Chip(
    name="H100 PCIe",
    device_kinds=("NVIDIA H100 PCIe",),
    hbm_bytes=84_942_979_072,
    hbm_bandwidth=2039e9,
    bfloat16=756e12,
    float32=378e12,
    link_bandwidth=64e9,
    network_bandwidth=None,
    per_host=8,
    plain_float32=51e12,
  ),
  Chip(
    name="H100 NVL",
    device_kinds=("NVIDIA H100 NVL",),
    hbm_bytes=94 * 10**9,
    hbm_bandwidth=3900e9,
    bfloat16=835e12,
    float32=417e12,
    link_bandwidth=64e9,
    network_bandwidth=None,
    per_host=8,
    plain_float32=60e12,
  ),
  Chip(
    name="GH200",
    device_kinds=("NVIDIA GH200 480GB",),
    hbm_bytes=96 * 10**9,
    hbm_bandwidth=4000e9,
    bfloat16=989e12,
    float32=494e12,
    link_bandwidth=450e9,
    network_bandwidth=None,
    per_host=1,
    plain_float32=67e12,
  ),
  Chip(
    name="H200",
    device_kinds=("NVIDIA H200",),
    hbm_bytes=151_397_597_184,
    hbm_bandwidth=4800e9,
    bfloat16=989e12,
    float32=494e12,
    link_bandwidth=450e9,
    network_bandwidth=50e9,
    per_host=8,
    plain_float32=67e12,
  ),
  Chip(
    name="B200",
    device_kinds=("NVIDIA B200",),
    hbm_bytes=191_514_411_008,
    hbm_bandwidth=8000e9,
    bfloat16=2250e12,
    float32=1125e12,
    link_bandwidth=900e9,
    network_bandwidth=50e9,
    per_host=8,
    plain_float32=75e12,
  ),
  Chip(
    name="L4",
    device_kinds=("NVIDIA L4",),
    hbm_bytes=24 * 10**9,
    hbm_bandwidth=300e9,
    bfloat16=121e12,
    float32=60e12,
    link_bandwidth=32e9,
    network_bandwidth=None,
    per_host=8,
    plain_float32=30.3e12,
  ),
  Chip(
    name="A10",
    device_kinds=("NVIDIA A10",),
    hbm_bytes=24 * 10**9,
    hbm_bandwidth=600e9,
    bfloat16=125e12,
    float32=62.5e12,
    link_bandwidth=32e9,
    network_bandwidth=None,
    per_host=8,
    plain_float32=31.2e12,
  ),
  Chip(
    name="L40S",
    device_kinds=("NVIDIA L40S",),
    hbm_bytes=48 * 10**9,
    hbm_bandwidth=864e9,
    bfloat16=362e12,
    float32=183e12,
    link_bandwidth=32e9,
    network_bandwidth=None,
    per_host=8,
    plain_float32=91.6e12,
  ),
)


def find(device_kind: str) -> Chip | None:
  """Returns the chip of a jax device kind; None if CHIPS has no such chip."""
  return next((c for c in CHIPS if device_kind in c.device_kinds), None)


def gpu_memory_fraction() -> float:
  """Returns the share of a GPU's memory that jax allocates for programs."""
  for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
    if value := os.environ.get(name):
      return float(value)
  return _GPU_FRACTION


def total_bytes(device: jax.Device) -> int:
  """Returns the memory of a device of this process.

  On CPU every device gets an equal share of the machine's memory.
  """
  total = (device.memory_stats() or {}).get("bytes_limit")
  if total is None:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    total = machine // jax.local_device_count()
  return total


def usable_bytes(total: int, platform: str) -> int:
  """Returns the part of a device's memory that training may plan with.

  Args:
    total: memory of the device in bytes.
    platform: 'cpu', 'gpu' or 'tpu'.
  """
  return int(total * _USABLE.get(platform, 0.5))


def device_bytes(device: jax.Device) -> int:
  """Returns `usable_bytes` of a device of this process."""
  return usable_bytes(total_bytes(device), device.platform)
