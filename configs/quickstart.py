"""A small run that exercises every part, in minutes on two CPU cores.

  make quickstart

The model memorises one video: its features name the clip and little else. With
augment.colour_jitter=0.4 they tell more of its parts than untrained ones, see
docs/RESULTS.md, and pictures take longer to become sharp. Sizes are chosen for
speed: clips are shorter, and half of each is masked instead of nine tenths as
in pretrain_b.py.
"""

from configs import pretrain_b


def get_config():
  config = pretrain_b.get_config()
  config.batch_size = 8
  config.num_epochs = 0.0
  config.num_steps = 1000

  # There is one video with a face: each of its records once per pass.
  config.data.sample_by = "record"
  config.data.num_frames = 4
  config.data.stride = 4
  config.mask.ratio = 0.5

  config.model.width = 128
  config.model.depth = 2
  config.model.num_heads = 4
  config.model.mlp_dim = 512
  config.model.dec_width = 128
  config.model.dec_depth = 2
  config.model.dec_num_heads = 4
  config.model.dec_mlp_dim = 512
  config.model.start_grey = True

  # The discriminator learns fast at this learning rate, so it is small and has
  # a small weight.
  config.adv.weight = 0.001
  config.adv.hidden = 64

  # 2e-3 at batch 8.
  config.optim.base_lr = 0.064
  config.optim.warmup_ratio = 0.05

  config.eval_steps = 200
  config.eval_batches = 2
  config.picture_steps = 200
  config.checkpoint_steps = 200
  return config
