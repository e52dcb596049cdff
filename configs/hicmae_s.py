"""HiCMAE's audio-visual pretraining, size S.

Paper: Sun et al. 2024, HiCMAE (Information Fusion, arXiv 2401.05698), and the
authors' script for VoxCeleb2. Not yet run in full with this code. The data set
must have sound: `data_prep.prepare --sound`.

The paper's: 160 pixels, 16 frames at stride 4, tube masks of 90% of the video's
tokens; patches of 16 x 16 of a mel spectrogram, random masks of 80% of them;
encoders of width 384, decoders of width 192 and depth 4; normalised targets,
differences between the frames of a token as half of the video's; a contrast of
weight 0.0025 and temperature 0.07; AdamW, 100 epochs of which 5 are warm-up, a
rate of 3e-4 at 256 clips.
Ours: encoders of 12 blocks each, where theirs have 10 and share 2 more, in
which they exchange tokens; so the sound is reconstructed from both modalities,
and the video from the video alone; one contrast of the encoders' outputs where
theirs compares three layers; decoders without connections from the encoders'
layers; Wav2Lip's spectrogram of 80 bands and 80 rows a second where theirs has
128 and 100; no augmentation of the sound; weight decay on kernels alone.
"""

from configs import pretrain_s


def get_config():
  config = pretrain_s.get_config()
  config.num_epochs = 100.0
  config.data.frame_size = 160
  config.data.stride = 4
  config.mask.strategy = "tube"
  config.input.imagenet_norm = True
  config.target.norm_pix = True
  config.target.motion_weight = 0.5
  config.adv.weight = 0.0
  config.sound.weight = 1.0
  config.sound.depth = 12
  config.optim.base_lr = 3e-4
  config.optim.warmup_ratio = 0.05
  config.optim.weight_decay = 0.05
  config.optim.decay_params = "kernels"
  return config
