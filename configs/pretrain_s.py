"""MARLIN ViT-S/16; otherwise as pretrain_b.py."""

from configs import pretrain_b


def get_config():
  config = pretrain_b.get_config()
  config.model.width = 384
  config.model.num_heads = 6
  config.model.mlp_dim = 1536
  config.model.dec_width = 192
  config.model.dec_num_heads = 3
  config.model.dec_mlp_dim = 768
  config.adv.hidden = 768
  return config
