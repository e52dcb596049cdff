"""XLA flags are set, and XLA applies them."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

from marlin_jax.devices import xla_flags

WANTED = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion"


@pytest.mark.parametrize(
  ("before", "after"),
  [
    (None, WANTED),
    ("--xla_dump_to=here", f"--xla_dump_to=here {WANTED}"),
    (WANTED, WANTED),
    ("--xla_backend_extra_options=a", "--xla_backend_extra_options=a"),
  ],
)
def test_what_is_set_already_stays(monkeypatch, before, after):
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  if before is not None:
    monkeypatch.setenv("XLA_FLAGS", before)
  xla_flags.set_for_training()
  assert os.environ["XLA_FLAGS"] == after


def test_gpus_are_deterministic_on_request_and_xla_knows_the_flag():
  code = (
    "import jax, os; from marlin_jax.devices import xla_flags; "
    "xla_flags.set_for_training(); xla_flags.set_deterministic(); "
    "print(jax.jit(lambda x: x + 1)(1), os.environ['XLA_FLAGS'])"
  )
  result = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout.startswith("2 ")
  assert "--xla_gpu_deterministic_ops=true" in result.stdout


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a flag for CPU")
def test_one_pass_writes_both_of_adams_moments():
  adam = optax.adam(0.1)

  def update(params, opt_state, grads):
    updates, opt_state = adam.update(grads, opt_state)
    return optax.apply_updates(params, updates), opt_state

  params = jnp.ones((512, 512))
  text = (
    jax.jit(update).lower(params, adam.init(params), params).compile().as_text()
  )
  array = r"f32\[512,512\]\S*"
  assert re.search(rf"= \({array}, {array}\) fusion", text), text
