"""Two fused linear layers, against one after the other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from marlin_jax.models import vit
from marlin_jax.models.prediction import Prediction

NUM_CLIPS, NUM_TOKENS, NARROW, WIDE, OUT = 2, 50, 8, 96, 24


def layers(dtype):
  rngs = nnx.Rngs(0)
  pair = [
    vit.dense(*sizes, rngs, dtype) for sizes in ((NARROW, WIDE), (WIDE, OUT))
  ]
  for layer in pair:
    layer.bias[...] = jax.random.normal(rngs.params(), layer.bias.shape)
  return pair


def one_by_one(first, second, x):
  return second(first(x))


def as_one(first, second, x):
  return Prediction.from_head(first, x).through(second)


def gradients(function, x, pair):
  def loss(state, x):
    return jnp.sin(function(*nnx.merge(graphdef, state), x)).sum()

  graphdef, state = nnx.split(nnx.List(pair))
  return jax.jit(jax.grad(loss, argnums=(0, 1))), state, x


@pytest.mark.parametrize(
  ("dtype", "tolerance"), [("float32", 1e-6), ("bfloat16", 2e-2)]
)
def test_values_and_gradients_are_those_of_the_two_layers(dtype, tolerance):
  x = jax.random.normal(jax.random.key(1), (NUM_CLIPS, NUM_TOKENS, NARROW))
  exact, pair = layers("float32"), layers(dtype)
  got = as_one(*pair, x)
  assert got.dtype == dtype
  compute, *arguments = gradients(as_one, x, pair)
  found = [got, *jax.tree.leaves(compute(*arguments))]
  compute, *arguments = gradients(one_by_one, x, exact)
  wanted = [one_by_one(*exact, x), *jax.tree.leaves(compute(*arguments))]
  assert len(found) == len(wanted) == 6
  for a, b in zip(found, wanted, strict=True):
    np.testing.assert_allclose(
      a.astype(jnp.float32), b, rtol=0, atol=tolerance * jnp.abs(b).max()
    )


def test_nothing_as_wide_as_what_lies_between_is_made_for_the_tokens():
  x = jnp.ones((NUM_CLIPS, NUM_TOKENS, NARROW))
  wide = f"<{NUM_CLIPS * NUM_TOKENS}x{WIDE}xf32>"
  made = {
    function: wide in compute.lower(*arguments).as_text()
    for function in (as_one, one_by_one)
    for compute, *arguments in [gradients(function, x, layers("float32"))]
  }
  assert made == {as_one: False, one_by_one: True}
