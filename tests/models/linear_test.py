"""Linear maps with float32 gradients of their weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from marlin_jax.devices import sharding
from marlin_jax.models import partition, vit
from marlin_jax.models.prediction import Prediction

NUM_ROWS = 4000


def gradients(function, float32_sums, *args):
  """Returns value and gradients of a sum, computed in bfloat16."""
  placement = sharding.MeshPlacement(
    sharding.make_mesh(devices=jax.devices()[:1]), "bfloat16", float32_sums
  )

  def loss(*args):
    with partition.use(placement):
      return jnp.square(function(*args).astype(jnp.float32)).sum()

  return jax.jit(jax.value_and_grad(loss, argnums=range(len(args))))(*args)


def layers(kinds):
  return [
    vit.dense(16, 16, nnx.Rngs(i), jnp.bfloat16, use_bias=has_bias)
    for i, has_bias in enumerate(kinds)
  ]


def one(layer):
  graphdef, params = nnx.split(layer)
  return lambda params, x: nnx.merge(graphdef, params)(x), params


def fused(layers):
  graphdef, params = nnx.split(nnx.List(layers))

  def call(params, x):
    return jnp.stack(vit.fused_dense(nnx.merge(graphdef, params), x))

  return call, params


def through(head, layer):
  graphdef, params = nnx.split(nnx.List([head, layer]))

  def call(params, x):
    head, layer = nnx.merge(graphdef, params)
    return Prediction.from_head(head, x).through(layer)

  return call, params


CASES = {
  "with bias": one(*layers([True])),
  "without bias": one(*layers([False])),
  "fused": fused(layers([True, False, True])),
  # Here the sums are of a product of weights, whose gradients are rounded.
  "prediction": through(*layers([True, True])),
}


@pytest.mark.parametrize("name", CASES)
def test_values_are_the_same_and_gradients_of_weights_are_not_rounded(
  name,
):
  function, params = CASES[name]
  x = jax.random.normal(jax.random.key(0), (NUM_ROWS, 1, 16)) + 1
  (want, (rough, rough_x)), (got, (exact, exact_x)) = (
    gradients(function, float32_sums, params, x)
    for float32_sums in (False, True)
  )
  assert got == want
  np.testing.assert_allclose(exact_x, rough_x, rtol=0.01, atol=1e-3)
  for grad in jax.tree.leaves(exact):
    is_rounded = (grad == grad.astype(jnp.bfloat16)).all()
    assert is_rounded == (name == "prediction")
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=0.02, atol=0.02 * np.abs(b).max()
    ),
    rough,
    exact,
  )
