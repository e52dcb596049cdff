"""MAE-DFER's pretraining objective on ViT-B/16.

Paper: Sun et al. 2023, MAE-DFER (ACM MM, arXiv 2307.02227), and the authors'
script for VoxCeleb2. Not yet run in full with this code.

The paper's: 160 pixels, 16 frames at stride 4, 90% of the tokens masked,
normalised targets, differences between the frames of a token as half of the
target, no discriminator, AdamW, 100 epochs of which 5 are warm-up, 64 clips per
step, a rate of 3e-4 at 256 clips.
Ours: a plain ViT-B encoder with 12 blocks where theirs has 16 blocks of local
and global attention; random masks where theirs mask by windows; weight decay on
kernels alone, as VideoMAE's code; no multi-scale crops
(`config.augment.min_crop_ratio` has similar ones).
"""

from configs import pretrain_b


def get_config():
  config = pretrain_b.get_config()
  config.batch_size = 64
  config.num_epochs = 100.0
  config.data.frame_size = 160
  config.data.stride = 4
  config.mask.strategy = "random"
  config.input.imagenet_norm = True
  config.target.norm_pix = True
  config.target.motion_weight = 0.5
  config.adv.weight = 0.0
  config.optim.base_lr = 3e-4
  config.optim.warmup_ratio = 0.05
  config.optim.weight_decay = 0.05
  config.optim.decay_params = "kernels"
  return config
