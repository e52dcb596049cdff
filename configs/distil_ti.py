"""A large encoder distilled into ViT-Ti/16.

Paper: Wang et al. 2023, Masked Video Distillation (CVPR, arXiv 2212.04500), in
which a student predicts a teacher's features of masked tokens. Not yet run in
full with this code.

The teacher is any encoder of clips of 16 frames and 224 pixels, such as a
finished run of pretrain_b.py, or of the authors (`marlin_vit_base_ytf`):

  python -m marlin_jax.train --config=configs/distil_ti.py \
    --config.teacher.path=runs/b --workdir=runs/distilled

The paper's: a teacher that learned to reconstruct pixels; its features are the
only target.
Ours: one teacher where the paper has two, of images and of videos; the mean
absolute error of normalised features, as V-JEPA's; MARLIN's masks; a decoder of
2 blocks; the schedule of pretrain_b.py with a higher rate for a small network.
"""

from configs import pretrain_b


def get_config():
  config = pretrain_b.get_config()
  config.teacher.path = "runs/b"
  config.teacher.weight = 1.0
  config.loss.pixel_weight = 0.0
  config.adv.weight = 0.0
  config.model.width = 192
  config.model.num_heads = 3
  config.model.mlp_dim = 768
  config.model.dec_width = 192
  config.model.dec_depth = 2
  config.model.dec_num_heads = 3
  config.model.dec_mlp_dim = 768
  config.optim.base_lr = 6e-4
  config.optim.weight_decay = 0.05
  config.optim.decay_params = "kernels"
  return config
