"""Descriptions of NVIDIA GPUs, for which XLA compiles without one."""

from __future__ import annotations

import dataclasses

from marlin_jax.devices import chips
from marlin_jax.devices.chips import Chip


@dataclasses.dataclass(frozen=True)
class Gpu:
  """Properties of a GPU that the compiler reads, in addition to its Chip's.

  Attributes:
    device_kind: value of jax.Device.device_kind, by which `chip` is found.
    compute_capability: major version.
    num_cores: streaming multiprocessors.
    fpus_per_core: float32 units of each multiprocessor.
    clock_ghz: highest clock rate.
    l2_bytes: second-level cache.
    shared_bytes: shared memory of a multiprocessor; a block may use 1 kB less.
  """

  device_kind: str
  compute_capability: int
  num_cores: int
  fpus_per_core: int
  clock_ghz: float
  l2_bytes: int
  shared_bytes: int

  @property
  def chip(self) -> Chip:
    return chips.find(self.device_kind)


# Name in a topology -> GPU. From NVIDIA's architecture white papers and CUDA
# programming guide; rates are not used, since nothing runs.
GPUS = {
  "a100": Gpu("NVIDIA A100-SXM4-80GB", 8, 108, 64, 1.41, 40 << 20, 164 << 10),
  "h100": Gpu("NVIDIA H100 80GB HBM3", 9, 132, 128, 1.98, 50 << 20, 228 << 10),
  "h200": Gpu("NVIDIA H200", 9, 132, 128, 1.98, 50 << 20, 228 << 10),
  "b200": Gpu("NVIDIA B200", 10, 148, 128, 1.965, 126 << 20, 228 << 10),
}
# Compute capability from which on the compiler may use instructions that only
# this architecture has: sm_90a, Hopper.
_ACCELERATED = 9


def target_config(gpu: Gpu) -> str:
  """Returns XLA's GpuTargetConfigProto of a GPU, as text.

  The versions are those of the libraries that jax[cuda13] brings.
  """
  chip = gpu.chip
  feature = "ACCELERATED_FEATURES"
  if gpu.compute_capability < _ACCELERATED:
    feature = "NONE"
  return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024
      threads_per_warp: 32
      shared_memory_per_block: 49152
      shared_memory_per_core: {gpu.shared_bytes}
      shared_memory_per_block_optin: {gpu.shared_bytes - 1024}
      threads_per_core_limit: 2048
      core_count: {gpu.num_cores}
      fpus_per_core: {gpu.fpus_per_core}
      block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535
      block_dim_limit_z: 65535
      memory_bandwidth: {int(chip.hbm_bandwidth)}
      l2_cache_size: {gpu.l2_bytes}
      clock_rate_ghz: {gpu.clock_ghz}
      device_memory_size: {chip.hbm_bytes}
      registers_per_core_limit: 65536
      registers_per_block_limit: 65536
      cuda_compute_capability {{
        major: {gpu.compute_capability}
        feature_extension: {feature}
      }}
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
    runtime_version {{ major: 13 minor: 0 patch: 0 }}
    device_description_str: "{gpu.device_kind}"
  """
