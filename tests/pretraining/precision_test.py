"""Precision of float32 matrix products, as the compilers are told."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from marlin_jax.inference import clip_features
from marlin_jax.models import vit
from marlin_jax.models.mae import Encoder
from marlin_jax.weights.architecture import Architecture
from tests.support.trainers import BATCH_SIZE, TUBELETS, make, step_of


def precisions(lowered):
  """Returns the precision of each matrix product of a program."""
  text = lowered.as_text()
  products = [x for x in text.splitlines() if "stablehlo.dot_general" in x]
  assert products
  return {
    found[1] if (found := re.search(r"precision = \[(\w+), \w+\]", x)) else None
    for x in products
  }


def test_training_computes_all_products_in_the_precision_of_its_setting():
  trainer, state = make("random", gp_weight=1.0)
  trainer = dataclasses.replace(trainer, matmul_precision="highest")
  batch = {
    "video": jnp.zeros((BATCH_SIZE, 4, 64, 64, 3), jnp.uint8),
    "regions": jnp.zeros((BATCH_SIZE, *TUBELETS.grid), jnp.uint16),
  }
  lowered = step_of(trainer).lower(state, batch, jax.random.key(0))
  assert precisions(lowered) == {"HIGHEST"}


def test_no_sum_runs_in_bfloat16():
  """XLA sums bfloat16 on GPU as bfloat16: gradients of biases lose digits."""
  trainer, state = make("random", dtype="bfloat16", gp_weight=1.0)
  batch = {
    "video": jnp.zeros((BATCH_SIZE, 4, 64, 64, 3), jnp.uint8),
    "regions": jnp.zeros((BATCH_SIZE, *TUBELETS.grid), jnp.uint16),
  }
  text = step_of(trainer).lower(state, batch, jax.random.key(0)).as_text()
  sums = re.findall(
    r"stablehlo.reduce\(.* applies stablehlo.add .*: \(tensor<([^>]*)>", text
  )
  assert sums
  assert not [x for x in sums if x.endswith("bf16")]


@pytest.mark.parametrize(
  ("dtype", "expected"), [("float32", "HIGHEST"), ("bfloat16", "DEFAULT")]
)
def test_features_in_float32_are_exact(dtype, expected):
  architecture = Architecture(
    width=16, depth=1, num_heads=2, mlp_dim=32, num_frames=2, image_size=32
  )
  graphdef, params = nnx.split(
    Encoder(
      num_tokens=architecture.tubelets.num_tokens,
      pixels=architecture.tubelets.pixels,
      size=architecture.encoder,
      execution=vit.Execution(dtype),
      rngs=nnx.Rngs(0),
    )
  )
  features = clip_features.jitted_features(graphdef, architecture)
  x = jnp.zeros((1, 2, 32, 32, 3), jnp.uint8)
  assert precisions(features.lower(params, x)) == {expected}
