"""What XLA is told beside the program: to be set before jax starts."""

from __future__ import annotations

import os

_EXTRA = "--xla_backend_extra_options"
# Of the CPU backend alone; others pass over it. Compilations take no such
# option one by one.
_ONE_PASS = "xla_cpu_use_multi_output_fusion"


def set_for_training() -> None:
  """Lets one pass over an array give several results, as Adam's two moments.

  Without it XLA's CPU backend reads the gradients once for each. What XLA_FLAGS
  has already stays, extra options too.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  if _EXTRA not in flags:
    os.environ["XLA_FLAGS"] = f"{flags} {_EXTRA}={_ONE_PASS}".strip()
