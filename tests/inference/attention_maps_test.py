"""Attention maps equal a loop in NumPy; shares by region."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from marlin_jax.inference import attention_maps
from marlin_jax.models import vit
from marlin_jax.models.mae import Encoder
from marlin_jax.records.schema import REGIONS

WIDTH, HEADS, TOKENS, PIXELS, DEPTH = 16, 2, 12, 24, 3


@pytest.fixture(scope="module")
def encoder():
  model = Encoder(
    num_tokens=TOKENS,
    pixels=PIXELS,
    size=vit.Size(WIDTH, DEPTH, HEADS, mlp_dim=32),
    execution=vit.Execution(),
    rngs=nnx.Rngs(0),
  )
  # Initial weights give almost uniform attention and zero biases.
  graphdef, state = nnx.split(model)
  np_rng = np.random.default_rng(0)
  drawn = jax.tree.map(
    lambda x: jnp.asarray(
      x + np_rng.normal(scale=0.5, size=x.shape), jnp.float32
    ),
    state,
  )
  return nnx.merge(graphdef, drawn)


@pytest.fixture(scope="module")
def patches():
  return jax.random.uniform(jax.random.key(0), (2, TOKENS, PIXELS))


@pytest.fixture(scope="module")
def maps(encoder, patches):
  return attention_maps.attention_maps(encoder, patches)


def norm(x, layer):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-5)
  return x * layer["scale"] + layer["bias"]


def linear(x, layer):
  return x @ layer["kernel"] + layer.get("bias", 0)


def gelu(x):
  return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def loop(encoder, patches):
  """Returns all attention matrices of a clip, float64 (L, H, N, N)."""
  state = jax.tree.map(
    lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(encoder))
  )
  x = linear(np.asarray(patches, np.float64), state["patch_embedding"])
  x = x + state["positions"]
  size = WIDTH // HEADS
  layers = []
  for i in range(DEPTH):
    block = state["transformer"]["blocks"][i]
    part = block["attention"]
    y = norm(x, block["norm1"])
    q, k, v = (linear(y, part[name]) for name in ("query", "key", "value"))
    mixed, matrices = np.zeros_like(x), []
    for head in range(HEADS):
      own = slice(head * size, (head + 1) * size)
      logits = np.exp(q[:, own] @ k[:, own].T / math.sqrt(size))
      matrices.append(logits / logits.sum(1, keepdims=True))
      mixed[:, own] = matrices[-1] @ v[:, own]
    layers.append(matrices)
    x = x + linear(mixed, part["out"])
    hidden = gelu(linear(norm(x, block["norm2"]), block["mlp_in"]))
    x = x + linear(hidden, block["mlp_out"])
  return np.array(layers)


def test_maps_equal_a_loop_over_layers_heads_and_matrices(
  encoder, patches, maps
):
  assert maps.heads.shape == (2, DEPTH, HEADS, TOKENS)
  assert maps.rollout.shape == (2, TOKENS)
  for clip in range(2):
    matrices = loop(encoder, patches[clip])
    assert matrices.std() > 0.05  # a uniform matrix would prove nothing
    np.testing.assert_allclose(
      maps.heads[clip], matrices.mean(axis=2), atol=2e-6
    )
    flow = np.eye(TOKENS)
    for heads in matrices:
      mixed = heads.mean(0) + np.eye(TOKENS)
      flow = (mixed / mixed.sum(1, keepdims=True)) @ flow
    np.testing.assert_allclose(maps.rollout[clip], flow.mean(0), atol=2e-6)


def test_every_map_sums_to_one(maps):
  for values in maps:
    assert values.dtype == jnp.float32
    assert (values >= 0).all()
    np.testing.assert_allclose(values.sum(-1), 1, atol=1e-5)


def blind(encoder, query_bias, key_kernel):
  """Returns the network with attention that depends on the keys alone.

  Its blocks return their input.
  """
  changed = nnx.clone(encoder)

  def fill(param, value):
    param[...] = jnp.broadcast_to(jnp.asarray(value, jnp.float32), param.shape)

  for block in changed.transformer.blocks:
    part = block.attention
    fill(part.query.kernel, 0)
    fill(part.query.bias, query_bias)
    fill(part.key.kernel, key_kernel)
    for layer in (part.out, block.mlp_out):
      fill(layer.kernel, 0)
      fill(layer.bias, 0)
    fill(block.norm1.scale, 1)
    fill(block.norm1.bias, 0)
  return changed


def test_uniform_attention_has_a_uniform_rollout(encoder, patches):
  even = blind(encoder, 0.0, np.zeros((WIDTH, WIDTH), np.float32))
  for values in attention_maps.attention_maps(even, patches):
    np.testing.assert_allclose(values, 1 / TOKENS, rtol=1e-5)


def test_rollout_of_attention_to_one_token_is_a_geometric_series(
  encoder, patches
):
  # Only token 5 is non-zero in channel 0, the only one that keys use.
  target = 5
  key_kernel = np.zeros((WIDTH, WIDTH), np.float32)
  key_kernel[0] = 1.0
  positions = np.zeros((TOKENS, WIDTH), np.float32)
  positions[:, 1] = 1.0
  positions[target] = np.eye(WIDTH)[0]
  model = blind(encoder, 100.0, key_kernel)
  model.patch_embedding.kernel[...] = jnp.zeros((PIXELS, WIDTH))
  model.patch_embedding.bias[...] = jnp.zeros(WIDTH)
  model.positions[...] = jnp.asarray(positions)

  maps = attention_maps.attention_maps(model, patches)
  only = np.eye(TOKENS)[target]
  np.testing.assert_allclose(maps.heads, only + 0 * maps.heads, atol=1e-6)
  # Each layer moves half of the flow to the target and keeps the other half.
  kept = 2.0**-DEPTH
  rollout = (1 - kept) * only + kept / TOKENS
  np.testing.assert_allclose(maps.rollout, [rollout] * 2, atol=1e-6)


def bits_of(*names):
  return sum(1 << REGIONS.index(name) for name in names)


def test_a_patch_in_several_regions_is_split_among_them():
  regions = np.array(
    [[[[bits_of("skin"), bits_of("skin", "nose")], [0, bits_of("hair")]]]],
    np.uint16,
  )
  shares = attention_maps.region_shares(
    np.array([[4.0, 2.0, 1.0, 1.0]]), regions
  )
  got = dict(zip(attention_maps.SHARES, shares[0], strict=True))
  want = {"skin": 5 / 8, "nose": 1 / 8, "hair": 1 / 8, "not parsed": 1 / 8}
  for name in attention_maps.SHARES:
    assert got[name] == pytest.approx(want.get(name, 0)), name
  areas = dict(
    zip(
      attention_maps.SHARES, attention_maps.area_shares(regions)[0], strict=True
    )
  )
  assert areas["skin"] == pytest.approx(3 / 8)
  assert areas["nose"] == pytest.approx(1 / 8)


def test_shares_of_every_map_sum_to_one(maps):
  np_rng = np.random.default_rng(0)
  regions = np_rng.integers(0, 2**11, (2, 3, 2, 2)).astype(np.uint16)
  for values in maps:
    shares = attention_maps.region_shares(values, regions)
    assert shares.shape == (*values.shape[:-1], len(REGIONS) + 1)
    np.testing.assert_allclose(shares.sum(-1), 1, atol=1e-9)
  np.testing.assert_allclose(attention_maps.area_shares(regions).sum(-1), 1)


def test_shares_for_another_number_of_tokens_are_refused(maps):
  regions = np.ones((2, 2, 2, 2), np.uint16)
  with pytest.raises(ValueError, match=r"expected \(B, \.\.\., t\*h\*w\)"):
    attention_maps.region_shares(maps.rollout, regions)
