"""Lip synchronisation: redraws the mouth of a face video to fit another sound.

MARLIN (CVPR 2023, section 4.2) trains it on LRS2 with Wav2Lip's recipe; the
authors released no code for it. The numbers here are Wav2Lip's (Prajwal et al.,
ACM MM 2020, and github.com/Rudrabha/Wav2Lip: hparams.py,
color_syncnet_train.py, wav2lip_train.py, hq_wav2lip_train.py); windows of 16
frames of 224 pixels are those of MARLIN's authors
(github.com/ControlNet/MARLIN, issues 1, 5, 16, 19). Not yet run in full here;
docs/LIPSYNC.md says what has been run.

  python -m data_prep.prepare --dataset=lrs2 --input=LRS2 --output=DATA \
    --sound --fps=25
  python -m marlin_jax.eval.ls --config=configs/eval_ls.py --mode=train_expert \
    --data=DATA --workdir=runs/ls_expert
  python -m marlin_jax.eval.ls --config=configs/eval_ls.py --mode=train \
    --data=DATA --checkpoint=runs/b --expert=runs/ls_expert --workdir=runs/ls

Wav2Lip itself, as a baseline: --config.generator.kind=wav2lip with an expert of
--config.expert.num_frames=5. With its quality discriminator, as published: add
--config.generator.adv_weight=0.07 --config.generator.sync_weight=0.03.
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  # Seed of the initial weights and the order of the clips.
  config.seed = 0

  config.data = ConfigDict()
  # Split to train on; several as "train+extra".
  config.data.train = "train"
  # Split for evaluation, of other people: an expert memorises voices.
  config.data.val = "val"
  # What a pass visits once: record, or subject: each person, and of the person
  # a record by chance. People then weigh the same, however much there is of
  # each.
  config.data.sample_by = "record"
  # Worker processes that read; 0: none, threads of the training's own process
  # read; -1: by the cores and devices.
  config.data.num_workers = -1
  # Reader threads in each worker process, or in the training's own if there are
  # no workers; 0: by the cores and devices.
  config.data.num_threads = 0
  # Unusable records (silent, too short, damaged) to tolerate: each is reported
  # and replaced by another record. The run ends at the next one.
  config.data.max_bad_records = 0

  # The sync expert judges whether pictures and sound belong together.
  config.expert = ConfigDict()
  # Frames of a window: 16, or 5 as published.
  config.expert.num_frames = 16
  # Factor of the numbers of channels.
  config.expert.width = 1.0
  # Height of the lower half of the face in pixels: 48 as published, or 24 for a
  # fourth of the computation.
  config.expert.height = 48
  # Side of the face crops that are read, in pixels. Twice `height` suffices.
  config.expert.frame_size = 224
  # cosine, as published: the cosine of frames and sound is the probability that
  # they are in sync; half of the pairs are. contrastive: of the sounds of a
  # record's clips, frames find their own, and the reverse. With little data it
  # learns more from each clip, but its cosine is not a probability.
  config.expert.loss = "cosine"
  # Divides the cosines of the contrastive loss.
  config.expert.temperature = 0.1
  # Clips of a record in a batch; at least 2 with the contrastive loss.
  config.expert.clips_per_record = 1
  # Share of the clips that are mirrored.
  config.expert.flip_ratio = 0.0
  # Least share of a face crop's area that a clip shows, at a random place.
  config.expert.min_crop_ratio = 1.0
  # Greatest change of brightness, and of the contrast of each colour.
  config.expert.colour_jitter = 0.0
  # Greatest change of loudness, in units of 12.5 dB.
  config.expert.gain_jitter = 0.0
  # Clips per step over all devices.
  config.expert.batch_size = 64
  # Learning rate of Adam.
  config.expert.lr = 1e-4
  # Weight decay of the kernels; above 0 the optimiser is AdamW.
  config.expert.weight_decay = 0.0
  # Length of the run in steps. Stop when the loss on `val` no longer falls.
  config.expert.num_steps = 200_000
  # Steps from one evaluation to the next.
  config.expert.eval_steps = 2000
  # Batches of an evaluation.
  config.expert.eval_batches = 4
  # The evaluation shifts the sound by up to so many frames both ways and looks
  # for the best offset.
  config.expert.max_offset = 5

  # The generator draws the mouth; its windows are as long as the expert's.
  config.generator = ConfigDict()
  # marlin (MARLIN's encoder) or wav2lip (trained from scratch).
  config.generator.kind = "marlin"
  # Fine-tune MARLIN's encoder; False: it is frozen.
  config.generator.train_encoder = False
  # Factor of the numbers of channels.
  config.generator.width = 1.0
  # Clips per step over all devices.
  config.generator.batch_size = 16
  # Learning rate of Adam, also of the discriminator's.
  config.generator.lr = 1e-4
  # Decay of the first moment.
  config.generator.b1 = 0.5
  # Decay of the second moment.
  config.generator.b2 = 0.999
  # Length of the run in steps.
  config.generator.num_steps = 200_000
  # Steps from one evaluation to the next.
  config.generator.eval_steps = 3000
  # Batches of an evaluation.
  config.generator.eval_batches = 8
  # Weight of the expert's loss on generated pictures. It is 0 until an
  # evaluation finds that loss below the threshold. The weight of L1 is what
  # sync_weight and adv_weight leave of 1.
  config.generator.sync_weight = 0.01
  # The threshold.
  config.generator.sync_threshold = 0.75
  # Weight of the adversarial loss; 0: no discriminator.
  config.generator.adv_weight = 0.0

  # The encoder of --checkpoint=random: MARLIN's, untrained. ViT-B/16.
  config.random = ConfigDict()
  # Embedding width.
  config.random.width = 768
  # Transformer blocks.
  config.random.depth = 12
  # Attention heads.
  config.random.num_heads = 12
  # Hidden units of each MLP.
  config.random.mlp_dim = 3072
  # Frames per clip.
  config.random.num_frames = 16
  # Side of a frame in pixels.
  config.random.image_size = 224
  # Frames per token.
  config.random.tubelet_size = 2
  # Side of a patch in pixels.
  config.random.patch_size = 16

  # Dtype of convolutions and matmuls; bfloat16 on TPU and GPU.
  config.dtype = "float32"
  # Attention of the encoder, as in configs/pretrain_b.py.
  config.attention = "auto"
  # Rematerialisation of the encoder, as in configs/pretrain_b.py.
  config.remat = "none"
  # Deterministic programs for GPUs, as in configs/pretrain_b.py.
  config.deterministic = False
  # Folder of compiled programs, as in configs/pretrain_b.py.
  config.compilation_cache = "auto"

  config.mesh = ConfigDict()
  # Devices that split the batch; -1: all.
  config.mesh.data = -1

  # Several processes that train together; see configs/pretrain_b.py.
  config.distributed = ConfigDict()
  # host:port of process 0, 'auto', 'none' or ''.
  config.distributed.coordinator = ""
  # Number of processes; only with host:port.
  config.distributed.num_processes = 0
  # Number of this process, from 0; only with host:port.
  config.distributed.process_id = 0
  # How long to wait for the other processes to start.
  config.distributed.timeout_secs = 300

  # Time without the end of a step, a save or an evaluation; 0: no limit.
  config.watchdog = ConfigDict()
  # After it the stacks of all threads are printed.
  config.watchdog.dump_secs = 900.0
  # After it the run ends with the exit code for a restart.
  config.watchdog.exit_secs = 3600.0

  # Comma-separated keys that may differ from those of the run that is resumed.
  config.allow_change = ""
  # Steps in a row with a loss or gradient that is not finite, after which the
  # run ends. Such steps are not applied.
  config.max_skipped_steps = 10

  # Steps from one line of metrics to the next.
  config.log_steps = 50
  # As in configs/pretrain_b.py.
  config.trackers = "tensorboard"
  # Steps from one picture to the next.
  config.picture_steps = 2000
  # Clips in a picture.
  config.picture_clips = 2
  # Steps from one checkpoint to the next; 0: checkpoint_minutes alone decides.
  config.checkpoint_steps = 1000
  # Minutes from one checkpoint to the next; 0: checkpoint_steps alone decides.
  config.checkpoint_minutes = 0.0
  # Most recent checkpoints to keep.
  config.keep_checkpoints = 3
  # Steps from one checkpoint that is kept for good to the next; 0: none.
  config.keep_every_steps = 0
  # Metric whose best checkpoint is kept; as in configs/pretrain_b.py.
  config.best_metric = ""
  # min or max, as in configs/pretrain_b.py.
  config.best_mode = "min"
  return config
