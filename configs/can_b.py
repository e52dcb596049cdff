"""CAN's contrastive masked autoencoder on face clips, ViT-B/16.

Paper: Mishra et al. 2022, CAN (arXiv 2210.16870), which is for images. Not yet
run in full with this code.

The paper's: half of the tokens masked at random in both views; InfoNCE between
the means of their visible tokens, at a temperature of 0.1, with a weight of
0.03 beside 0.67 for the reconstruction; normalised targets, no discriminator.
Ours: the two views are clips of one track, as CVRL (Qian et al. 2021, CVPR)
draws them from one video; with subjects known, set data.sample_by='subject':
then they are clips of different videos of a person. A projection of two layers
without batch normalisation; crops and mirrors alone as augmentation; no noise
to predict (the paper's third loss, of weight 0.3); the decoder and the schedule
of pretrain_b.py.

Each step compares a clip with batch_size - 2 others, with microbatches with
those of its own: raise batch_size and clips_per_device as far as memory allows.
"""

from configs import pretrain_b


def get_config():
  config = pretrain_b.get_config()
  config.batch_size = 256
  config.data.draws_per_unit = 2
  config.augment.flip_ratio = 0.5
  config.augment.min_crop_ratio = 0.5
  config.augment.max_crop_aspect = 4 / 3
  config.mask.strategy = "random"
  config.mask.ratio = 0.5
  config.input.imagenet_norm = True
  config.target.norm_pix = True
  config.adv.weight = 0.0
  config.loss.pixel_weight = 0.67
  config.contrast.weight = 0.03
  config.contrast.temperature = 0.1
  config.optim.weight_decay = 0.05
  config.optim.decay_params = "kernels"
  return config
