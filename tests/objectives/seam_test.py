"""Extra objectives in the training step: gradients, state, metrics."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict

from marlin_jax.models import vit
from marlin_jax.objectives import objective
from marlin_jax.objectives.objective import OBJECTIVES, Objective
from marlin_jax.pretraining import losses, train_step
from tests.support.trainers import BATCH_SIZE, TUBELETS, make, step_of

FIXED = {"offset": np.full(32, 0.5, np.float32)}


class Summary(Objective):
  """Predicts numbers of a clip from its encoded tokens."""

  name = "summary"
  fields = types.MappingProxyType({"numbers": jax.ShapeDtypeStruct((3,), "f4")})
  frozen = FIXED

  def networks(self, rngs):
    return nnx.Dict(
      head=vit.dense(32, 3, rngs, "float32"), table=vit.position_table(1, 3)
    )

  def loss(self, own, frozen, forward, batch):
    mean = forward.encoded.mean(1) + frozen["offset"]
    error = own["head"](mean) + own["table"][...] - batch["numbers"]
    noise = jax.vmap(jax.random.normal)(batch["keys"])
    loss = (
      jnp.square(error).mean()
      + jnp.square(forward.prediction.features[..., :3]).mean()
    )
    return loss, {"noise": noise.mean(), "hidden": batch["masked"].mean() * 1.0}

  @property
  def flops(self):
    return 3 * 2 * 32 * 3

  def describe(self):
    return "three numbers"


def with_summary(weight=0.3, **settings):
  """Returns a trainer with that objective, and its first state."""
  config = ConfigDict({"summary": {"weight": weight}})
  added = Summary(types.SimpleNamespace(config=config))
  trainer, state = make(**settings)
  trainer = dataclasses.replace(trainer, objectives=(added,))
  own, fixed = objective.draw((added,), jax.random.key(5))
  return trainer, train_step.init_state(
    trainer, state.params | own, state.fixed | fixed, state.disc_params
  )


@pytest.fixture(scope="module")
def batch():
  np_rng = np.random.default_rng(0)
  shape = (BATCH_SIZE, 4, 64, 64, 3)
  return {
    "video": np_rng.integers(0, 256, shape).astype(np.uint8),
    "regions": np_rng.integers(0, 2048, (BATCH_SIZE, *TUBELETS.grid)).astype(
      np.uint16
    ),
    "numbers": np_rng.normal(size=(BATCH_SIZE, 3)).astype(np.float32),
  }


def expected_grads(trainer, state, batch, rng, weight):
  """Differentiates the sum of all losses as one function of all parameters."""
  keys = jax.random.split(jax.random.fold_in(rng, state.step), BATCH_SIZE)
  (patches, visible, masked), target, _, _ = trainer.prepare(
    batch | {"keys": keys}
  )

  def loss(params):
    own = params[OBJECTIVES]["summary"]
    rest = {k: x for k, x in params.items() if k != OBJECTIVES}
    fixed = {k: x for k, x in state.fixed.items() if k != OBJECTIVES}
    network = nnx.merge(trainer.mae, rest, fixed)
    encoded = network.encoder(patches, visible)
    prediction = network.predict(patches, visible, masked)
    numbers = (encoded.mean(1) + 0.5) @ own["head"]["kernel"]
    numbers += own["head"]["bias"] + state.fixed[OBJECTIVES]["summary"]["table"]
    extra = jnp.square(numbers - batch["numbers"]).mean()
    extra += jnp.square(prediction.features[..., :3]).mean()
    rec = losses.reconstruction_loss(prediction.pixels, target)
    return trainer.pixel_weight * rec + weight * extra

  return jax.jit(jax.grad(loss))(state.params)


@pytest.mark.parametrize(
  ("num_microbatches", "pixel_weight"), [(1, 0.5), (2, 0.0)]
)
def test_gradients_are_those_of_the_weighted_sum(
  batch, num_microbatches, pixel_weight
):
  trainer, state = with_summary(weight=0.3, num_microbatches=num_microbatches)
  adversarial = dataclasses.replace(trainer.adversarial, weight=0.0)
  trainer = dataclasses.replace(
    trainer, pixel_weight=pixel_weight, adversarial=adversarial
  )
  rng = jax.random.key(3)
  step = jax.jit(functools.partial(train_step.train_step, trainer))
  new, metrics = step(state, batch, rng, {"summary": FIXED})
  want = expected_grads(trainer, state, batch, rng, 0.3)
  got = new.opt_state[0]  # see trainers.remember
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    np.testing.assert_allclose(
      a, b, rtol=1e-4, atol=5e-6 * float(jnp.abs(b).max()), err_msg=str(path)
    )
  np.testing.assert_allclose(
    metrics["loss"],
    pixel_weight * metrics["loss_rec"] + 0.3 * metrics["loss_summary"],
    rtol=1e-6,
  )
  assert metrics.keys() >= {"summary/noise", "summary/hidden"}


def test_the_adversarial_loss_and_others_add_up(batch):
  trainer, state = with_summary(weight=0.3)
  rng, frozen = jax.random.key(3), {"summary": FIXED}
  new, metrics = step_of(trainer)(state, batch, rng, frozen)
  np.testing.assert_allclose(
    metrics["loss"],
    metrics["loss_rec"]
    + 0.1 * metrics["loss_adv"]
    + 0.3 * metrics["loss_summary"],
    rtol=1e-6,
  )
  # Masks, and so MARLIN's losses, are those of a step without the objective.
  plain, plain_state = make()
  _, plain_metrics = step_of(plain)(plain_state, batch, rng)
  for name in ("loss_rec", "loss_adv", "loss_disc", "adv_pull"):
    np.testing.assert_allclose(metrics[name], plain_metrics[name], rtol=1e-5)
  moved = new.params[OBJECTIVES]["summary"]["head"]["kernel"]
  assert optax.tree.norm(
    jax.tree.map(
      jnp.subtract, moved, state.params[OBJECTIVES]["summary"]["head"]["kernel"]
    )
  )


def test_an_objectives_keys_depend_on_its_name_alone(batch):
  """Adding another objective must not change what one draws."""
  trainer, state = with_summary()
  other = type("Other", (Summary,), {"name": "other"})
  config = ConfigDict({"other": {"weight": 1.0}})
  both = (other(types.SimpleNamespace(config=config)), *trainer.objectives)
  own, fixed = objective.draw(both, jax.random.key(5))
  for name, tree in state.params[OBJECTIVES].items():
    jax.tree.map(np.testing.assert_array_equal, own[OBJECTIVES][name], tree)
  assert not np.array_equal(
    own[OBJECTIVES]["other"]["head"]["kernel"],
    own[OBJECTIVES]["summary"]["head"]["kernel"],
  )
  trainer = dataclasses.replace(trainer, objectives=both)
  state = train_step.init_state(
    trainer, state.params | own, state.fixed | fixed, state.disc_params
  )
  rng, frozen = jax.random.key(3), {"summary": FIXED, "other": FIXED}
  _, two = step_of(trainer)(state, batch, rng, frozen)
  trainer, state = with_summary()
  _, one = step_of(trainer)(state, batch, rng, frozen)
  assert two["summary/noise"] == one["summary/noise"] != two["other/noise"]
