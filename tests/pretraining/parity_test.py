"""The same numbers as the authors' network and training step, in float32.

Weights are drawn at random and converted by the code under test. Position
tables are the converted ones, as for an imported checkpoint. Clips are small,
which only changes the number of tokens; the slow tests take those of the paper.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from marlin_jax.inference.marlin import Marlin
from marlin_jax.models import vit
from marlin_jax.pretraining import train_step
from marlin_jax.pretraining.masking import Masking
from marlin_jax.pretraining.pretext_task import PretextTask
from marlin_jax.weights import marlin_pytorch as marlin_format
from marlin_jax.weights import name_tables, torch_files
from marlin_jax.weights.architecture import Architecture
from marlin_jax.weights.weights import Weights, of_modules
from tests.support import authors

# On two busy cores L and the steps of B take minutes.
pytestmark = pytest.mark.timeout(900)

SIZES = {
  "S": Architecture(384, 12, 6, 1536, 192, 4, 3, 768, disc_hidden=768),
  "B": Architecture(768, 12, 12, 3072, 384, 4, 6, 1536, disc_hidden=1536),
  "L": Architecture(1024, 24, 16, 4096, 512, 12, 8, 2048, disc_hidden=2048),
}


def of_size(name, is_small):
  """Returns an architecture, for 392 tokens or for the paper's 1568."""
  small = {"image_size": 112} if is_small else {}
  return dataclasses.replace(SIZES[name], **small)


def cases(*names):
  """Marks every size for small and for the paper's clips; the first is quick.

  The others are slow.
  """
  sizes = [
    *((of_size(n, True), f"{n}-small") for n in names),
    *((of_size(n, False), n) for n in names),
  ]
  return pytest.mark.parametrize(
    "architecture",
    [
      pytest.param(size, id=name, marks=[pytest.mark.slow] if i else [])
      for i, (size, name) in enumerate(sizes)
    ],
  )


def random_weights(architecture):
  """As Architecture draws them; its own way takes half a minute for L."""
  np_rng = np.random.default_rng(2)
  arrays = {}
  for name, shape in architecture.shapes().items():
    if name.endswith("positions"):
      array = vit.sincos_positions(*shape)
    elif name.endswith("kernel"):
      num = 3 if "attention" in name and "out" not in name else 1
      limit = np.sqrt(6 / (shape[0] + num * shape[1]))
      array = np_rng.uniform(-limit, limit, shape)
    elif name == "mask_token":
      array = np_rng.normal(0, 0.02, shape)
    elif name == "discriminator.hidden.bias":
      # Leaky ReLU's slope jumps at 0, and among two million inputs some would
      # lie so near that rounding decides. Half the units are far on either
      # side.
      array = np.where(np.arange(*shape) % 2, 4.0, -4.0)
    else:
      array = np.full(shape, float(name.endswith("scale")))
    arrays[name] = array.astype(np.float32)
  return Weights(architecture, arrays)


def random_clip(architecture, seed):
  """uint8 (1, T, H, W, C), smooth enough to have structure."""
  side = architecture.image_size // 8
  shape = (1, architecture.num_frames, side, side, 3)
  coarse = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
  return coarse.repeat(8, axis=2).repeat(8, axis=3)


@cases("S", "B", "L")
def test_features_and_predictions_equal_the_authors(architecture):
  weights = random_weights(architecture).without_discriminator()
  theirs, ours = authors.network(weights), Marlin(weights)
  x = random_clip(architecture, 0) / np.float32(255)
  # Pooled features of B and L take the same path as those of S.
  is_s = architecture.width == SIZES["S"].width
  for keep_seq in (True, False) if is_s else (True,):
    want = theirs.extract_features(authors.clips(x), keep_seq=keep_seq)
    got = ours.extract_features(x, keep_seq=keep_seq)
    np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-4)
  num_tokens = architecture.tubelets.num_tokens
  visible = np.random.default_rng(1).permutation(num_tokens) < num_tokens // 10
  with torch.no_grad():
    want = theirs(authors.clips(x), torch.from_numpy(visible)[None])
  graphdef, state = nnx.split(ours.mae)
  seen, hidden = np.flatnonzero(visible)[None], np.flatnonzero(~visible)[None]
  tokens = ours.architecture.tubelets.patchify(x)
  got = jax.jit(lambda state, *args: nnx.merge(graphdef, state)(*args))(
    state, tokens[:, seen[0]], seen, hidden
  )
  np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-4)


class AuthorsStep:
  """The authors' alternating step, written afresh.

  One forward for the discriminator's update, another for the autoencoder's.
  """

  def __init__(self, weights, weight, lr, disc_lr):
    self.weight = weight
    self.tubelets = weights.architecture.tubelets
    self.mae = authors.network(weights).train()
    theirs = name_tables.write(
      marlin_format.rules(weights.architecture), weights.arrays
    )
    self.disc = torch.nn.Sequential(
      torch.nn.Linear(1536, weights.architecture.disc_hidden),
      torch.nn.LeakyReLU(0.01),
      torch.nn.Linear(weights.architecture.disc_hidden, 1),
    )
    self.disc.load_state_dict(
      torch_files.to_torch(
        {
          f"{2 * i}.{kind}": theirs[f"discriminator.layers.{i}.linear.{kind}"]
          for i in (0, 1)
          for kind in ("weight", "bias")
        }
      )
    )
    self.optimizers = [
      torch.optim.SGD(self.mae.parameters(), lr),
      torch.optim.SGD(self.disc.parameters(), disc_lr),
    ]

  def __call__(self, x, visible):
    """x (B, T, H, W, C) in [0, 1], visible bool (B, N) -> losses."""
    tokens = torch.from_numpy(self.tubelets.patchify(x))
    visible = torch.from_numpy(visible)
    target = tokens[~visible].view(len(x), -1, tokens.shape[-1])
    mae_optimizer, disc_optimizer = self.optimizers

    pred = self.mae(authors.clips(x), visible).detach()
    loss_disc = self.disc(pred).mean() - self.disc(target).mean()
    disc_optimizer.zero_grad()
    loss_disc.backward()
    disc_optimizer.step()

    pred = self.mae(authors.clips(x), visible)
    loss_rec = torch.nn.functional.mse_loss(pred, target)
    loss_adv = -self.disc(pred).mean()
    mae_optimizer.zero_grad()
    disc_gradients = [p.grad.clone() for p in self.disc.parameters()]
    (loss_rec + self.weight * loss_adv).backward()
    for parameter, gradient in zip(
      self.disc.parameters(), disc_gradients, strict=True
    ):
      parameter.grad = gradient
    mae_optimizer.step()
    return [float(loss.detach()) for loss in (loss_rec, loss_adv, loss_disc)]

  def gradients(self):
    """All gradients of the last step by the names of the authors' files."""
    found = {
      name: parameter.grad.numpy()
      for name, parameter in self.mae.named_parameters()
      if parameter.grad is not None
    }
    for name, parameter in self.disc.named_parameters():
      i, kind = name.split(".")
      key = f"discriminator.layers.{int(i) // 2}.linear.{kind}"
      found[key] = parameter.grad.numpy()
    return found


class Gradients(optax.GradientTransformation):
  """Keeps the gradients it sees as its state, and passes them on."""

  def __new__(cls):
    return super().__new__(
      cls,
      lambda params: jax.tree.map(jnp.zeros_like, params),
      lambda updates, state, params=None: (updates, updates),
    )


@cases("S", "B")
def test_five_alternating_steps_have_the_authors_losses_and_gradients(
  architecture,
):
  weights, weight, lr, disc_lr = random_weights(architecture), 0.01, 0.03, 0.001
  tubelets = architecture.tubelets
  theirs = AuthorsStep(weights, weight, lr, disc_lr)
  mae_parts = vit.split_model(weights.autoencoder())
  disc_parts = vit.split_model(weights.discriminator())
  # Not Adam, which would make a full step of the rounding in a gradient that is
  # 0, as that of the discriminator's last bias.
  trainer = train_step.Trainer(
    PretextTask(tubelets, Masking("random", 0.9, tubelets.grid)),
    train_step.Adversarial(weight, gp_weight=0.0, d_steps=1, g_steps=1),
    mae_parts[0],
    disc_parts[0],
    optax.chain(Gradients(), optax.sgd(lr)),
    optax.chain(Gradients(), optax.sgd(disc_lr)),
  )
  state = train_step.init_state(trainer, *mae_parts[1:], disc_parts[1])
  step = jax.jit(
    functools.partial(train_step.train_step, trainer), donate_argnums=0
  )
  rng = jax.random.key(0)
  regions = np.zeros((1, *tubelets.grid), np.uint16)
  for i in range(5):
    video = random_clip(architecture, i)
    # The mask that our step draws.
    keys = jax.random.split(jax.random.fold_in(rng, i), 1)
    mask_keys = jax.vmap(jax.random.split)(keys)[:, 0]
    index, _ = trainer.task.masking(regions, mask_keys)
    visible = np.zeros((1, tubelets.num_tokens), bool)
    visible[0, np.asarray(index[0])] = True

    want = theirs(video.astype(np.float32) / 255, visible)
    state, metrics = step(state, {"video": video, "regions": regions}, rng)
    got = [float(metrics[f"loss_{k}"]) for k in ("rec", "adv", "disc")]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)

    # Ours under the authors' names; position tables have no gradient.
    ours = of_modules(
      weights.architecture,
      _with_tables(state.opt_state[0], state.fixed),
      state.disc_opt_state[0],
    )
    ours = name_tables.write(
      marlin_format.rules(ours.architecture), ours.arrays
    )
    gradients = theirs.gradients()
    assert gradients.keys() == ours.keys() - {
      "encoder.pos_embedding.emb",
      "decoder.pos_embedding.emb",
    }
    # Biases shift the scores of both sides alike: no gradient but rounding.
    for layer in range(2):
      name = f"discriminator.layers.{layer}.linear.bias"
      assert np.linalg.norm(gradients.pop(name)) < 1e-6
      assert np.linalg.norm(ours[name]) < 1e-6
    for player in ("mae", "discriminator"):
      is_disc = player == "discriminator"
      mine = [n for n in gradients if n.startswith("disc") == is_disc]
      assert distance(ours, gradients, mine) < 1e-5, (i, player)
    for name in gradients:
      assert distance(ours, gradients, [name]) < 1e-5, (i, name)


def distance(got, want, names):
  """Relative L2 over some arrays."""
  difference = sum(np.square(got[n] - want[n]).sum() for n in names)
  return np.sqrt(difference / sum(np.square(want[n]).sum() for n in names))


def _with_tables(gradients, fixed):
  return {
    **gradients,
    **{k: v for k, v in fixed.items() if k != "encoder"},
    "encoder": {**gradients["encoder"], **fixed["encoder"]},
  }
