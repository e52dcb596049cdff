"""MARLIN's objective on clips that grow during the run, ViT-B/16.

Papers: Li et al. 2025, Efficient VideoMAE via Temporal Progressive Training
(TPT, CVPR workshops); Assran et al. 2025, V-JEPA 2 (arXiv 2506.09985). Not yet
run in full with this code.

TPT's: clips of few frames first and longer ones later; its abstract reports the
accuracy of VideoMAE at half of the cost on Kinetics-400. V-JEPA 2's: the clips
of full length and size come last, for 12 of 252 thousand steps, while the
learning rate falls.
Ours: three stages, of 8 frames of 112 pixels, 8 of 224 and 16 of 224; the first
masks 75% of the tokens, as fewer of them repeat each other. As many steps as
pretrain_b.py on YouTube Faces and its learning rate; 49% of the arithmetic. For
another length set num_steps and curriculum together.
"""

from configs import pretrain_b


def get_config():
  config = pretrain_b.get_config()
  config.num_epochs = 0.0
  config.num_steps = 162_000
  config.curriculum = (
    "60000: data.num_frames=8, data.frame_size=112, mask.ratio=0.75; "
    "60000: data.num_frames=8"
  )
  return config
