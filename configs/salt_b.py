"""SALT's second stage on ViT-B/16: latent targets of a frozen teacher.

Paper: Li et al. 2025, Rethinking JEPA: Compute-Efficient Video SSL with Frozen
Teachers (arXiv 2509.24317). Not yet run in full with this code.

The teacher is trained first, here the S of MARLIN:

  python -m marlin_jax.train --config=configs/pretrain_s.py --workdir=runs/s
  python -m marlin_jax.train --config=configs/salt_b.py --workdir=runs/salt \
    --config.teacher.path=runs/s

The paper's: a teacher that learned to reconstruct pixels and then stays as it
is, smaller than the student; its features of the masked tokens as the only
target; no moving average.
Ours: MARLIN's masks by face regions where the paper's hide blocks; MARLIN's
decoder of 4 blocks as the predictor; features normalised by token and the mean
absolute error, as in V-JEPA; the schedule of pretrain_b.py.
"""

from configs import pretrain_b


def get_config():
  config = pretrain_b.get_config()
  config.teacher.path = "runs/s"
  config.teacher.weight = 1.0
  config.loss.pixel_weight = 0.0
  config.adv.weight = 0.0
  config.optim.weight_decay = 0.05
  config.optim.decay_params = "kernels"
  return config
