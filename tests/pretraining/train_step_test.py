"""The step with one forward, against the reference's with two."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from marlin_jax.pretraining import losses, train_step
from tests.support.trainers import BATCH_SIZE, TUBELETS, make, step_of


@pytest.fixture(scope="module")
def recipe():
  """Returns a trainer, its first state, and its compiled step."""
  trainer, state = make()
  return trainer, state, step_of(trainer)


@pytest.fixture(scope="module")
def batch():
  np_rng = np.random.default_rng(0)
  shape = (BATCH_SIZE, 4, 64, 64, 3)
  return {
    "video": np_rng.integers(0, 256, shape).astype(np.uint8),
    "regions": np_rng.integers(0, 2048, (BATCH_SIZE, *TUBELETS.grid)).astype(
      np.uint16
    ),
  }


def two_forward_step(trainer, state, batch, rng):
  """Takes the reference's step: the autoencoder runs for every update."""
  step_rng = jax.random.fold_in(rng, state.step)
  keys = jax.vmap(jax.random.split)(jax.random.split(step_rng, BATCH_SIZE))
  (patches, visible, masked), target = trainer.task.inputs_and_target(
    batch["video"], batch["regions"], keys[:, 0], trainer.decoder_ratio
  )

  weights = trainer.task.weights(batch["regions"], keys[:, 0], masked)
  weights = 1.0 if weights is None else weights

  def run(params):
    model = nnx.merge(trainer.mae, params, state.fixed)
    return model(patches, visible, masked)

  def judge(disc_params, tokens):
    return nnx.merge(trainer.discriminator, disc_params)(tokens)

  settings = trainer.adversarial
  metrics = {}
  for i in range(settings.d_steps):

    def disc_loss(both, i=i):
      params, disc_params = both
      pred = run(params)
      loss = (judge(disc_params, pred)).mean() - (
        judge(disc_params, target)
      ).mean()
      if settings.gp_weight:
        penalty_keys = jax.vmap(lambda key: jax.random.fold_in(key, i))(
          keys[:, 1]
        )
        loss += settings.gp_weight * losses.gradient_penalty(
          functools.partial(judge, disc_params), pred, target, penalty_keys
        )
      return loss

    # Differentiated by both, as the reference does; one gradient is unused.
    loss, (_, grads) = jax.value_and_grad(disc_loss)(
      (state.params, state.disc_params)
    )
    state = trainer.update_disc(state, grads)
    metrics["loss_disc"] = loss
  for _ in range(settings.g_steps):

    def mae_loss(params, disc_params=state.disc_params):
      pred = run(params)
      loss_rec = (weights * jnp.square(pred - target)).mean()
      loss_adv = -judge(disc_params, pred).mean()
      return loss_rec + settings.weight * loss_adv, (loss_rec, loss_adv)

    grads, (loss_rec, loss_adv) = jax.grad(mae_loss, has_aux=True)(state.params)
    state = trainer.update_mae(state, grads)
    metrics |= {"loss_rec": loss_rec, "loss_adv": loss_adv}
  return state, metrics


def assert_same_gradients(got, want):
  """Compares gradients, with float32 rounding of each array's largest."""
  flat_got, flat_want = (
    jax.tree_util.tree_leaves_with_path(
      {"mae": s.opt_state[0], "disc": s.disc_opt_state[0]}
    )
    for s in (got, want)
  )
  for (path, a), (_, b) in zip(flat_got, flat_want, strict=True):
    scale = float(jnp.abs(b).max())
    if "out" in str(path) and "bias" in str(path) and "disc" in str(path):
      # It shifts all scores alike: no loss depends on it.
      scale = 1.0
    assert scale > 0, path
    np.testing.assert_allclose(
      a, b, rtol=0, atol=5e-6 * scale, err_msg=jax.tree_util.keystr(path)
    )


@pytest.mark.parametrize(
  "settings",
  [
    pytest.param({"weight": 0.01}, id="recipe"),
    pytest.param(
      {
        "weight": 0.1,
        "gp_weight": 10.0,
        "d_steps": 3,
        "g_steps": 2,
        "decoder_ratio": 0.5,
      },
      id="several_of_each",
      marks=pytest.mark.slow,
    ),
    pytest.param(
      {
        "strategy": "crfr_p",
        "decoder_ratio": 0.5,
        "task": {"motion_weight": 0.25, "region_weight": 0.5},
      },
      id="weighted",
      marks=pytest.mark.slow,
    ),
  ],
)
def test_the_step_equals_the_two_forward_step(batch, settings):
  rng = jax.random.key(3)
  trainer, state = make(**settings)
  want, want_metrics = jax.jit(functools.partial(two_forward_step, trainer))(
    state, batch, rng
  )
  for num_microbatches in (1, 2):
    trainer, _ = make(num_microbatches=num_microbatches, **settings)
    got, metrics = step_of(trainer)(state, batch, rng)
    for name, value in want_metrics.items():
      np.testing.assert_allclose(metrics[name], value, rtol=2e-6, atol=1e-7)
    assert_same_gradients(got, want)
    assert int(got.step) == 1


def test_one_autoencoder_forward_and_backward_per_step(batch, recipe):
  """Counted in the compiled step: the decoder's head appears three times.

  Once forwards, and backwards for its weights and for its input.
  """
  trainer, state, step = recipe
  text = step.lower(state, batch, jax.random.key(0)).as_text()
  masks = trainer.task.masking
  num_tokens = BATCH_SIZE * (masks.num_tokens - masks.num_visible)
  shapes = (f"<{num_tokens}x16xf32>", f"<{num_tokens}x{TUBELETS.pixels}xf32>")
  heads = [
    line
    for line in text.splitlines()
    if "dot_general" in line and all(shape in line for shape in shapes)
  ]
  assert len(heads) == 3, heads


@pytest.mark.parametrize(
  ("dtype", "tolerance"), [("float32", 1e-3), ("bfloat16", 0.05)]
)
def test_max_pull_limits_the_adversarial_gradient_of_each_clip(
  batch, dtype, tolerance
):
  max_pull = 0.01
  features = {}
  for name, settings in (
    ("reconstruction", {"weight": 0.0}),
    ("limited", {"weight": 10.0, "max_pull": max_pull}),
  ):
    trainer, state = make(dtype=dtype, **settings)

    @jax.jit
    def mae_grad(state, batch, trainer=trainer):
      inputs, target, weights, _ = trainer.prepare(batch)
      prediction = trainer.predict(state.params, state.fixed, *inputs)
      return trainer.mae_grad(prediction, target, weights, state.disc_params)

    keys = jax.random.split(jax.random.key(0), BATCH_SIZE)
    grad, metrics = mae_grad(state, batch | {"keys": keys})
    features[name] = np.float32(grad.features)
  assert metrics["adv_pull"] > 10 * max_pull
  adversarial = features["limited"] - features["reconstruction"]
  norms, limits = (
    np.sqrt(np.square(x).sum((1, 2)))
    for x in (adversarial, features["reconstruction"])
  )
  np.testing.assert_allclose(norms, max_pull * limits, rtol=tolerance)


def test_without_adversarial_weight_the_discriminator_rests(batch):
  trainer, state = make(weight=0.0)
  new, metrics = step_of(trainer)(state, batch, jax.random.key(0))
  jax.tree.map(
    np.testing.assert_array_equal, new.disc_params, state.disc_params
  )
  assert "loss_adv" not in metrics
  assert metrics["loss_rec"] > 0


def test_steps_differ_in_their_masks(batch, recipe):
  _, state, step = recipe
  rng = jax.random.key(0)
  _, first = step(state, batch, rng)
  _, other = step(state.replace(step=state.step + 1), batch, rng)
  assert first["loss_rec"] != other["loss_rec"]


def test_clips_of_one_colour_give_finite_gradients(batch):
  trainer, state = make(norm_pix=True, gp_weight=10.0)
  flat = dict(batch, video=np.full_like(batch["video"], 77))
  new, metrics = step_of(trainer)(state, flat, jax.random.key(0))
  for leaf in jax.tree.leaves((new.params, new.disc_params, metrics)):
    assert np.isfinite(leaf).all()


@pytest.mark.parametrize("norm_pix", [False, True])
def test_reconstruct_keeps_visible_pixels_and_counts_the_rest(batch, norm_pix):
  trainer, state = make(norm_pix=norm_pix)
  result = jax.jit(functools.partial(train_step.reconstruct, trainer))(
    state, batch, jax.random.split(jax.random.key(0), BATCH_SIZE)
  )
  tokens = TUBELETS.patchify(batch["video"] / np.float32(255))
  made = TUBELETS.patchify(np.asarray(result["video"]))
  visible = np.asarray(result["visible"])
  assert (visible.sum(1) == trainer.task.masking.num_visible).all()
  np.testing.assert_allclose(made[visible], tokens[visible], atol=1e-6)
  hidden = ~visible
  np.testing.assert_allclose(
    result["loss_pixels"],
    np.square(made[hidden] - tokens[hidden]).mean(),
    rtol=1e-5,
  )
  colours = tokens.reshape(*tokens.shape[:2], 3, -1)
  own = colours.mean(-1, keepdims=True)
  of_batch = losses.batch_colour_loss(
    float(result["loss_own_colour"]), result["colour_sums"], BATCH_SIZE
  )
  for found, flat in (
    (result["loss_own_colour"], own),
    (of_batch, own.mean(0)),
  ):
    want = np.square(colours - flat)[hidden].mean()
    np.testing.assert_allclose(found, want, rtol=1e-4)


def test_normalised_targets_have_no_mean_and_unit_deviation(batch):
  trainer, _ = make(norm_pix=True)
  keys = jax.random.split(jax.random.key(0), BATCH_SIZE)
  _, target = trainer.task.inputs_and_target(
    batch["video"], batch["regions"], keys
  )
  colours = np.asarray(target).reshape(*target.shape[:2], 3, -1)
  np.testing.assert_allclose(colours.mean(-1), 0, atol=1e-4)
  np.testing.assert_allclose(colours.std(-1, ddof=1), 1, atol=1e-3)


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_weighs_a_new_value_more_at_first_with_warm_up(
  recipe, warmup
):
  trainer, state, _ = recipe
  trainer = dataclasses.replace(trainer, ema_decay=0.99, ema_warmup=warmup)
  state = state.replace(
    params={"x": jnp.full(2, 3.0)}, ema={"x": jnp.full(2, 1.0)}
  )
  # Skipped steps update nothing: they do not count.
  for step, num_skipped, decay in (
    (0, 0, 0.1),
    (10, 2, 0.5),
    (10_000, 0, 0.99),
  ):
    state = state.replace(
      step=jnp.int32(step), num_skipped=jnp.int32(num_skipped)
    )
    new = trainer.update_ema(state).ema["x"]
    expected = 3 - 2 * (decay if warmup else 0.99)
    np.testing.assert_allclose(new, expected, rtol=1e-6)
