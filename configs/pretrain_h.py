"""ViT-H/16 at VideoMAE's sizes; otherwise as pretrain_b.py.

The paper's largest model is L.
"""

from configs import pretrain_b


def get_config():
  config = pretrain_b.get_config()
  config.model.width = 1280
  config.model.depth = 32
  config.model.num_heads = 16
  config.model.mlp_dim = 5120
  config.model.dec_width = 640
  config.model.dec_depth = 12
  config.model.dec_num_heads = 8
  config.model.dec_mlp_dim = 2560
  config.adv.hidden = 2560
  return config
