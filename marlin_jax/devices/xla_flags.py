"""XLA flags; set before jax starts."""

from __future__ import annotations

import os

_EXTRA = "--xla_backend_extra_options"
# Only the CPU backend reads it. It cannot be set per compilation.
_ONE_PASS = "xla_cpu_use_multi_output_fusion"


def set_for_training() -> None:
  """Enables fusions with several outputs, such as Adam's two moments, on CPU.

  Without them XLA's CPU backend reads the gradients once per output. Flags that
  XLA_FLAGS holds already stay as they are; if they include extra backend
  options, nothing is added.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  if _EXTRA not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} {_EXTRA}={_ONE_PASS}".strip()


def set_deterministic() -> None:
  """Makes programs for NVIDIA GPUs give the same bits in every run.

  XLA then uses no atomic additions, and does not choose among algorithms by
  measuring them.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
