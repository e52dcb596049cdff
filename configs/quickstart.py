"""A small run that shows every part at work: minutes on two CPU cores."""

from configs import pretrain_b


def get_config():
  config = pretrain_b.get_config()
  config.batch_size = 8
  config.num_epochs = 0.0
  config.num_steps = 400

  config.model.width = 192
  config.model.depth = 4
  config.model.num_heads = 3
  config.model.mlp_dim = 768
  config.model.dec_width = 96
  config.model.dec_depth = 2
  config.model.dec_num_heads = 3
  config.model.dec_mlp_dim = 384

  config.adv.hidden = 64

  config.optim.base_lr = 6.4e-2  # 2e-3 at batch 8
  config.optim.warmup_ratio = 0.05

  config.eval_steps = 100
  config.eval_batches = 2
  config.picture_steps = 100
  config.checkpoint_steps = 100
  return config
