"""Small encoder for hours on two CPU cores, as in docs/RESULTS.md.

The method is MARLIN's (pretrain_b.py); each departure makes a step cheaper or
the run steadier, so that there are many passes over the videos. A finished run
goes on with a higher num_steps.

  python -m marlin_jax.train --config=configs/pretrain_ti.py \
    --config.data.path=DATASET --workdir=runs/ti
"""

from configs import pretrain_b


def get_config():
  config = pretrain_b.get_config()
  config.num_epochs = 0.0
  config.num_steps = 20_000

  # 98 tokens per clip, where MARLIN has 1,568. A clip covers 16 frames, half of
  # MARLIN's.
  config.data.num_frames = 4
  config.data.stride = 4
  config.data.frame_size = 112
  # Less to read per clip.
  config.data.clips_per_record = 2

  # Against memorising people in hundreds of passes.
  config.augment.flip_ratio = 0.5
  config.augment.min_crop_ratio = 0.7
  config.augment.max_crop_aspect = 1.15
  config.augment.stride_jitter = 2
  # Against features that only name the clip, see docs/RESULTS.md.
  config.augment.colour_jitter = 0.4

  # The width of ViT-Ti with half its blocks, which take 1.3 times the steps in
  # the same time.
  config.model.width = 192
  config.model.depth = 6
  config.model.num_heads = 3
  config.model.mlp_dim = 768
  config.model.dec_width = 96
  config.model.dec_depth = 2
  config.model.dec_num_heads = 3
  config.model.dec_mlp_dim = 384
  config.model.start_grey = True

  # With few tokens nine tenths leave too little to see.
  config.mask.ratio = 0.75

  # So that the loss alone decides; a discriminator at a high learning rate may
  # outweigh the reconstruction.
  config.adv.weight = 0.0
  config.adv.hidden = 64

  # 1e-3 at batch 32. A constant rate with averaged weights can be evaluated at
  # any step, and continued.
  config.optim.base_lr = 8e-3
  config.optim.schedule = "constant"
  config.optim.warmup_ratio = 0.0
  config.optim.warmup_steps = 300
  config.optim.weight_decay = 0.05
  config.optim.decay_params = "kernels"
  config.optim.clip_norm = 1.0
  config.ema_decay = 0.999
  config.ema_warmup = True

  config.eval_steps = 500
  config.picture_steps = 500
  config.checkpoint_steps = 500
  return config
