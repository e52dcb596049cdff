"""A small trainer and its step."""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from marlin_jax.data import clip_geometry
from marlin_jax.models import discriminator, mae, vit
from marlin_jax.pretraining import masking, pretext_task, train_step

TUBELETS = clip_geometry.Tubelets(num_frames=4, image_size=64)
BATCH_SIZE = 4
# Compiler options with which two programs round the same sum alike, as outside
# of tests; see XLA_FLAGS in tests/conftest.py.
SAME_ROUNDING = {"xla_cpu_use_fusion_emitters": True}


def remember() -> optax.GradientTransformation:
  """Returns an optimiser that stores the last gradients and passes them on."""
  return optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda grads, _, params=None: (grads, grads),
  )


def make(
  strategy="fasking",
  num_microbatches=1,
  norm_pix=False,
  decoder_ratio=0.0,
  dtype="float32",
  task=None,
  **adversarial,
):
  """Returns a small trainer and its first state.

  `task` holds further settings of the PretextTask.
  """
  sizes = {"num_tokens": TUBELETS.num_tokens, "pixels": TUBELETS.pixels}
  graph, params, fixed = vit.split_model(
    mae.MAE(
      encoder=vit.Size(width=32, depth=1, num_heads=2, mlp_dim=64),
      decoder=vit.Size(width=16, depth=1, num_heads=2, mlp_dim=32),
      execution=vit.Execution(dtype),
      rngs=nnx.Rngs(0),
      **sizes,
    )
  )
  disc_graph, disc_params, _ = vit.split_model(
    discriminator.Discriminator(
      pixels=TUBELETS.pixels, hidden=24, rngs=nnx.Rngs(1), dtype=dtype
    )
  )
  settings = {"weight": 0.1, "gp_weight": 0.0, "d_steps": 1, "g_steps": 1}
  # Not Adam: its first step turns rounding in a gradient that should be 0, that
  # of the discriminator's last bias, into a full step of either sign.
  optimizer = optax.chain(remember(), optax.sgd(1e-2))
  trainer = train_step.Trainer(
    task=pretext_task.PretextTask(
      TUBELETS,
      masking.Masking(strategy, 0.75, TUBELETS.grid),
      norm_pix,
      **task or {},
    ),
    adversarial=train_step.Adversarial(**settings | adversarial),
    mae=graph,
    discriminator=disc_graph,
    optimizer=optimizer,
    disc_optimizer=optimizer,
    num_microbatches=num_microbatches,
    decoder_ratio=decoder_ratio,
  )
  return trainer, train_step.init_state(trainer, params, fixed, disc_params)


def step_of(trainer, compiler_options=None):
  step = functools.partial(train_step.train_step, trainer)
  return jax.jit(step, compiler_options=compiler_options)
