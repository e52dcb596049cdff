"""The networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from marlin_jax.models import mae, stacking, vit
from marlin_jax.models.vit import split_model

SIZES = {
  "num_tokens": 12,
  "pixels": 24,
  "encoder": vit.Size(width=16, depth=2, num_heads=2, mlp_dim=32),
  "decoder": vit.Size(width=8, depth=2, num_heads=2, mlp_dim=16),
}


def make(*, first_prediction=None, **execution):
  return mae.MAE(
    **SIZES,
    first_prediction=first_prediction,
    execution=vit.Execution(**execution),
    rngs=nnx.Rngs(0),
  )


@pytest.fixture(scope="module")
def inputs():
  np_rng = np.random.default_rng(0)
  visible = np.stack([np_rng.permutation(12)[:4] for _ in range(3)])
  masked = np.stack([np.setdiff1d(np.arange(12), v) for v in visible])
  patches = np_rng.normal(size=(3, 4, 24)).astype(np.float32)
  return jnp.asarray(patches), jnp.asarray(visible), jnp.asarray(masked)


def loss_and_gradients(model, inputs):
  graph, params, fixed = split_model(model)

  def loss(params):
    return jnp.square(nnx.merge(graph, params, fixed)(*inputs)).mean()

  return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize(
  "options",
  [{"scan": True}, {"remat": "full"}, {"scan": True, "remat": "dots"}],
  ids=str,
)
def test_scan_and_remat_change_neither_parameters_nor_gradients(
  inputs, options
):
  want = loss_and_gradients(make(), inputs)
  got = stacking.unstack(loss_and_gradients(make(**options), inputs))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
    got,
    want,
  )


def test_predictions_come_in_the_order_of_the_masked_tokens(inputs):
  model = make()
  patches, visible, masked = inputs
  flipped = model(patches[:, ::-1], visible[:, ::-1], masked[:, ::-1])
  np.testing.assert_allclose(
    flipped[:, ::-1], model(patches, visible, masked), atol=1e-5
  )


def test_a_clip_does_not_see_its_neighbours(inputs):
  model = make()
  alone = model(*(x[1:2] for x in inputs))
  np.testing.assert_allclose(alone, model(*inputs)[1:2], atol=1e-5)


def test_matmuls_run_in_bfloat16_and_parameters_stay_float32(inputs):
  model = make(dtype=jnp.bfloat16)
  _, params, _ = split_model(model)
  assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
  pred = model(*inputs)
  assert pred.dtype == jnp.float32
  np.testing.assert_allclose(pred, make()(*inputs), atol=0.1)
  text = jax.jit(lambda: model(*inputs)).lower().as_text()
  dots = [line for line in text.splitlines() if "dot_general" in line]
  assert all("bf16" in line for line in dots)


def test_the_key_has_no_bias_and_projections_start_as_one_matrix():
  attention = make().encoder.transformer.blocks[0].attention
  assert attention.key.bias is None
  assert attention.query.bias is not None
  # Xavier over the fan of query, key and value together.
  limit = np.sqrt(6 / (16 + 48))
  largest = float(jnp.abs(attention.query.kernel[...]).max())
  assert 0.9 * limit < largest <= limit


def test_the_first_prediction_may_be_given(inputs):
  first = jnp.arange(24) / 24
  predicted = make(first_prediction=first)(*inputs)
  np.testing.assert_array_equal(
    predicted, np.broadcast_to(first, predicted.shape)
  )


def test_targets_are_normalised_by_unbiased_statistics():
  values = np.random.default_rng(0).normal(2, 3, (2, 3, 16)).astype(np.float32)
  values[1, 2] = -1  # of one value
  mean, std = mae.value_stats(jnp.asarray(values))
  np.testing.assert_allclose(mean[..., 0], values.mean(-1), atol=1e-5)
  want = values.std(-1, ddof=1) + 1e-6
  np.testing.assert_allclose(std[..., 0], want, rtol=1e-5)
  assert (((values - mean) / std)[1, 2] == 0).all()


def test_positions_alternate_sine_and_cosine():
  table = vit.sincos_positions(1568, 384)
  assert table.dtype == np.float32
  position, channel = 977, 40
  angle = position / 10000 ** (channel / 384)
  np.testing.assert_allclose(table[position, channel], np.sin(angle), atol=1e-6)
  np.testing.assert_allclose(
    table[position, channel + 1], np.cos(angle), atol=1e-6
  )


def test_tokens_that_are_not_wanted_do_not_change_the_others(inputs):
  decoder = make().decoder
  x = jax.random.normal(jax.random.key(0), (2, 7, 8))
  np.testing.assert_allclose(decoder(x, start=3), decoder(x)[:, 3:], atol=1e-6)


def test_gelu_is_the_exact_one_and_so_is_its_slope():
  x = jnp.linspace(-9, 9, 2001)
  exact = functools.partial(jax.nn.gelu, approximate=False)
  np.testing.assert_allclose(vit.gelu(x), exact(x), atol=1e-6)
  slopes, want = (jax.vmap(jax.grad(f))(x) for f in (vit.gelu, exact))
  np.testing.assert_allclose(slopes, want, atol=1e-6)
  low = x.astype(jnp.bfloat16)
  assert vit.gelu(low).dtype == jnp.bfloat16
  np.testing.assert_allclose(
    vit.gelu(low).astype(jnp.float32),
    exact(low.astype(jnp.float32)),
    rtol=4e-3,
    atol=1e-6,
  )
