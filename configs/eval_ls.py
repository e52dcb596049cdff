"""Lip synchronisation: a face's mouth drawn anew, to fit another sound.

MARLIN (CVPR 2023, section 4.2) has it on LRS2 with Wav2Lip's recipe; the
authors released no code for it. Numbers here are Wav2Lip's (Prajwal et al., ACM
MM 2020, and github.com/Rudrabha/Wav2Lip: hparams.py, color_syncnet_train.py,
wav2lip_train.py, hq_wav2lip_train.py), the windows of 16 frames of 224 pixels
MARLIN's authors' (github.com/ControlNet/MARLIN, issues 1, 5, 16, 19). Not yet
run whole here; docs/LIPSYNC.md says what was.

  python -m data_prep.prepare --dataset=lrs2 --input=LRS2 --output=DATA \
    --sound --fps=25
  python -m marlin_jax.eval.ls --config=configs/eval_ls.py --mode=train_expert \
    --data=DATA --workdir=runs/ls_expert
  python -m marlin_jax.eval.ls --config=configs/eval_ls.py --mode=train \
    --data=DATA --checkpoint=runs/b --expert=runs/ls_expert --workdir=runs/ls

Wav2Lip itself, as a control: --config.generator.kind=wav2lip with an expert of
--config.expert.num_frames=5. With the quality discriminator, as published:
--config.generator.adv_weight=0.07 --config.generator.sync_weight=0.03.
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.seed = 0

  config.data = ConfigDict()
  config.data.train = "train"  # names of splits
  config.data.val = "val"  # of other people: an expert knows voices by heart
  config.data.num_threads = 2
  # Records that may be of no use (silent, too short, damaged): each is told of,
  # and another taken instead.
  config.data.max_bad_records = 0

  # Tells whether pictures and sound belong together.
  config.expert = ConfigDict()
  config.expert.num_frames = 16  # or 5, as published
  config.expert.width = 1.0  # factor of the numbers of channels
  config.expert.batch_size = 64
  config.expert.lr = 1e-4  # Adam's
  config.expert.num_steps = 200_000  # until the loss on `val` no longer falls
  config.expert.eval_steps = 2000
  config.expert.eval_batches = 4
  # Frames by which the sound is shifted to and fro, to find the best offset.
  config.expert.max_offset = 5

  # Draws the mouth; its windows are as long as the expert's.
  config.generator = ConfigDict()
  config.generator.kind = "marlin"  # or wav2lip, which learns from scratch
  config.generator.train_encoder = False  # True: MARLIN's encoder is fine-tuned
  config.generator.width = 1.0
  config.generator.batch_size = 16
  config.generator.lr = 1e-4  # Adam's, of the discriminator too
  config.generator.b1 = 0.5
  config.generator.b2 = 0.999
  config.generator.num_steps = 200_000
  config.generator.eval_steps = 3000
  config.generator.eval_batches = 8
  # Of the expert's loss on drawn pictures, from the evaluation on in which it
  # is below the threshold; 0 until then.
  config.generator.sync_weight = 0.01
  config.generator.sync_threshold = 0.75
  config.generator.adv_weight = 0.0  # 0: no discriminator
  # What is left of 1 is the weight of L1.

  # What --checkpoint=random stands for: MARLIN's encoder, without what it has
  # learned. ViT-B/16.
  config.random = ConfigDict()
  config.random.width = 768
  config.random.depth = 12
  config.random.num_heads = 12
  config.random.mlp_dim = 3072
  config.random.num_frames = 16
  config.random.image_size = 224
  config.random.tubelet_size = 2
  config.random.patch_size = 16

  config.dtype = "float32"  # of convolutions and matmuls; bfloat16 on TPU, GPU
  config.attention = "auto"  # of the encoder; as in configs/pretrain_b.py
  config.remat = "none"  # likewise

  config.mesh = ConfigDict()
  config.mesh.data = -1  # devices that share the batch; -1: all

  # Several processes, each with devices of its own, that train together; see
  # configs/pretrain_b.py.
  config.distributed = ConfigDict()
  config.distributed.coordinator = ""
  config.distributed.num_processes = 0
  config.distributed.process_id = 0
  config.distributed.timeout_secs = 300

  # Seconds without the end of a step, a save or an evaluation; 0: for ever.
  config.watchdog = ConfigDict()
  config.watchdog.dump_secs = 900.0  # then the stacks of all threads are shown
  config.watchdog.exit_secs = 3600.0  # then the run ends, to be started again

  # Keys, with commas between, that may differ from the run that is resumed.
  config.allow_change = ""
  # Steps in a row without a finite loss and gradient; none of them is applied.
  config.max_skipped_steps = 10

  config.log_steps = 50
  config.picture_steps = 2000
  config.picture_clips = 2
  config.checkpoint_steps = 1000
  config.keep_checkpoints = 3
  return config
