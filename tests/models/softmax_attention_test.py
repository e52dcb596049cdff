"""Every implementation of attention, against loops in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from marlin_jax.models import softmax_attention

# Too many tokens to keep the weights, and not a multiple of a chunk, of queries
# or of heads.
TOKENS, QUERIES, HEADS, SIZE = 900, 831, 5, 16
NAMES = ("plain", "chunked", "by_head", "flash")


@pytest.fixture(scope="module")
def inputs():
  """Returns q (1, M, H, K), k and v (1, N, H, K), and the output's gradient.

  Values that bfloat16 can hold, so that it starts with the same ones.
  """
  np_rng = np.random.default_rng(0)
  shapes = (QUERIES, TOKENS, TOKENS, QUERIES)
  # Logits above 88, whose exponential overflows float32.
  scales = (5, 5, 1, 1)
  return [
    np.asarray(
      (scale * np_rng.normal(size=(1, n, HEADS, SIZE))).astype(jnp.bfloat16),
      np.float32,
    )
    for scale, n in zip(scales, shapes, strict=True)
  ]


@pytest.fixture(scope="module")
def expected(inputs):
  """Returns output and three gradients, computed row by row."""
  q, k, v, slope = (x[0].astype(np.float64) for x in inputs)
  out, d_q = np.zeros_like(q), np.zeros_like(q)
  d_k, d_v = np.zeros_like(k), np.zeros_like(v)
  for head in range(HEADS):
    for row in range(QUERIES):
      logits = k[:, head] @ q[row, head] / np.sqrt(SIZE)
      weights = np.exp(logits - logits.max())
      weights /= weights.sum()
      out[row, head] = weights @ v[:, head]
      d_v[:, head] += np.outer(weights, slope[row, head])
      d_weights = v[:, head] @ slope[row, head]
      d_logits = weights * (d_weights - weights @ d_weights) / np.sqrt(SIZE)
      d_q[row, head] = d_logits @ k[:, head]
      d_k[:, head] += np.outer(d_logits, q[row, head])
  return [x[None] for x in (out, d_q, d_k, d_v)]


def run(name, dtype, inputs):
  attend = functools.partial(softmax_attention.attend, name)
  # Pallas kernels for TPU run in the interpreter here.
  with pltpu.force_tpu_interpret_mode():
    *args, slope = (jnp.asarray(x, dtype) for x in inputs)
    out, pull_back = jax.vjp(jax.jit(attend), *args)
    return out, *pull_back(slope)


@pytest.mark.parametrize("name", NAMES)
def test_results_and_gradients_are_exact_to_rounding(name, inputs, expected):
  for got, want in zip(run(name, jnp.float32, inputs), expected, strict=True):
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("name", NAMES)
def test_in_bfloat16_they_are_good_for_two_digits(name, inputs, expected):
  for got, want in zip(run(name, jnp.bfloat16, inputs), expected, strict=True):
    assert got.dtype == jnp.bfloat16
    error = np.abs(np.asarray(got, np.float32) - want).mean()
    assert error < 0.02 * np.abs(want).mean()


def test_chunks_never_hold_all_weights():
  """Neither forward nor backward; 'plain' does, so the test can fail."""
  x = jax.ShapeDtypeStruct((2, 1024, 16, 8), jnp.float32)
  all_weights = 4 * 2 * 16 * 1024**2

  def temporaries(name):
    def loss(q, k, v):
      return jnp.square(softmax_attention.attend(name, q, k, v)).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x)
    return compiled.compile().memory_analysis().temp_size_in_bytes

  assert temporaries("plain") > all_weights
  assert temporaries("by_head") < temporaries("chunked") < all_weights


@pytest.mark.parametrize(
  ("platform", "dtype", "name"),
  [
    ("cpu", "float32", "by_head"),
    ("gpu", "bfloat16", "cudnn"),
    ("gpu", "float32", "chunked"),
    ("tpu", "bfloat16", "flash"),
  ],
)
def test_each_backend_has_its_own(platform, dtype, name):
  assert softmax_attention.choose("auto", platform, dtype) == name
  assert softmax_attention.choose("plain", platform, dtype) == "plain"
