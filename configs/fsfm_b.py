"""FSFM's masking and region loss on video, ViT-B/16.

Paper: Wang et al. 2025, FSFM (CVPR, arXiv 2412.12032), which is for images; and
the authors' code. Not yet run in full with this code.

The paper's: CRFR-P masks of 75% of the tokens, a second reconstruction loss of
weight 0.007 on the region that is hidden whole, normalised targets.
Ours: clips of 16 frames, in which the region is hidden throughout; the decoder
and the schedule of pretrain_b.py, without its discriminator. The paper's
contrast between two views, without negatives and with an average of the weights
as the target, is left out; `config.contrast` is one of another kind, with
negatives (configs/can_b.py).
"""

from configs import pretrain_b


def get_config():
  config = pretrain_b.get_config()
  config.mask.strategy = "crfr_p"
  config.mask.ratio = 0.75
  config.loss.region_weight = 0.007
  config.input.imagenet_norm = True
  config.target.norm_pix = True
  config.adv.weight = 0.0
  config.optim.weight_decay = 0.05
  config.optim.decay_params = "kernels"
  return config
