"""MARLIN ViT-L/16; otherwise as pretrain_b.py."""

from configs import pretrain_b


def get_config():
  config = pretrain_b.get_config()
  config.model.width = 1024
  config.model.depth = 24
  config.model.num_heads = 16
  config.model.mlp_dim = 4096
  config.model.dec_width = 512
  config.model.dec_depth = 12
  config.model.dec_num_heads = 8
  config.model.dec_mlp_dim = 2048
  config.adv.hidden = 2048
  return config
