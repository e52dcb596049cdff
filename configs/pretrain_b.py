"""MARLIN ViT-B/16, the paper's pretraining recipe.

Paper: MARLIN, CVPR 2023 (arXiv 2211.06627), section 4 and the authors' code.
Data: YouTube Faces, 2,593 training videos; 2000 epochs are 162,063 steps.
Hardware of the authors: 2x A6000, 32 clips per step, float32. Not yet run in
full with this code.

  python -m marlin_jax.train --config=configs/pretrain_b.py \
    --config.data.path=DATASET --workdir=runs/b

Differences from the authors' recipe: the learning rate changes every step, not
every epoch; weights start at random unless init_from names a VideoMAE
checkpoint, which the authors started from.
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  # Seed of the initial weights, the masks and the order of the clips.
  config.seed = 0

  # Clips per step over all devices. If they do not fit at once, gradients are
  # accumulated over microbatches.
  config.batch_size = 32
  # Clips per device in one microbatch; 0: as many as are estimated to fit.
  config.clips_per_device = 0
  # Length of the run in epochs; 0 if num_steps is set. An epoch is as many
  # clips as there are source videos, whatever data.clips_per_record is.
  config.num_epochs = 2000.0
  # Length of the run in steps; 0 if num_epochs is set.
  config.num_steps = 0
  # Earlier stages on smaller clips, 'STEPS: KEY=VALUE, KEY=VALUE; STEPS: ...',
  # with the keys data.num_frames, data.frame_size and mask.ratio; the last
  # stage has the values of this file. '': one stage. docs/TRAINING.md.
  config.curriculum = ""

  config.data = ConfigDict()
  # Folder written by data_prep.prepare, local or gs://. 'sample' is a tiny real
  # data set, prepared on first use. Several with weights: 'data/ytf:1,data/v:3'
  # takes three quarters of the clips from data/v.
  config.data.path = "sample"
  # Split to train on.
  config.data.split = "train"
  # Split for the reconstruction loss and the pictures. '': 'val' if the data
  # set has it, else data.split.
  config.data.eval_split = ""
  # Tracks of a lower quality (docs/DATA.md) are not trained on; evaluation uses
  # all tracks. 0: use all tracks.
  config.data.min_quality = 0.0
  # Each of these once per epoch: video, as the paper; or subject (the same
  # person's videos count as one). A clip begins at any frame of a video that
  # leaves room for it. record: segments of a track, of which a long video has
  # more; a clip is within one.
  config.data.sample_by = "video"
  # hashed: an order without memory. stored: the order of runs begun before
  # `hashed` existed, which takes 8 bytes for each video or record.
  config.data.order = "hashed"
  # Videos (or subjects, records) that are mixed with each other; windows follow
  # each other nearly as in the shards, so that a disk or a bucket that is slow
  # at random reads is read almost in sequence. 0: all are mixed.
  config.data.shuffle_window = 0
  # Frames per clip.
  config.data.num_frames = 16
  # A clip shows every stride-th frame.
  config.data.stride = 2
  # Height and width of the network's picture in pixels, a multiple of
  # model.patch_size; at most those of the records, 224 or
  # data_prep.prepare --frame_size. Larger frames are scaled down.
  config.data.frame_size = 224
  # Clips drawn from each record that is read (repeated sampling). Above 1 there
  # is less to read and to decode per clip; batch_size must be a multiple of it.
  config.data.clips_per_record = 1
  # Draws in a row of each video or subject, so that neighbours in a batch show
  # the same person, as contrast needs: with sample_by=subject of different
  # videos as long as there are some, with video of one track. batch_size must
  # be a multiple of it times clips_per_record.
  config.data.draws_per_unit = 1
  # Worker processes that read, for each process of the training; 0: none,
  # threads of the training's own process read; -1: by the cores and devices.
  config.data.num_workers = -1
  # Reader threads in each worker process, or in the training's own if there are
  # no workers; 0: by the cores and devices.
  config.data.num_threads = 0
  # Unreadable records to tolerate: each is reported and replaced by another
  # record. The run ends at the next one.
  config.data.max_bad_records = 0

  # Random changes of the training clips, drawn for each clip as a whole. Region
  # bits follow the pixels.
  config.augment = ConfigDict()
  # Share of the clips that are mirrored.
  config.augment.flip_ratio = 0.0
  # Least share of the frame's area that a clip shows, scaled to the whole
  # picture; 1: no crops.
  config.augment.min_crop_ratio = 1.0
  # Greatest ratio of the sides of what a clip shows, at least 1.
  config.augment.max_crop_aspect = 1.0
  # Greatest change of data.stride, up or down.
  config.augment.stride_jitter = 0
  # Greatest change of the factors of red, green and blue, each drawn around 1;
  # up to 100 times as much, of 255, is added to each.
  config.augment.colour_jitter = 0.0

  # Initial weights: a workdir, or any checkpoint that marlin_jax.convert reads,
  # such as VideoMAE's .pth, or a name, as marlin_vit_base_ytf. '': random.
  config.init_from = ""
  # Comma-separated keys that may differ from those of the run that is resumed.
  config.allow_change = ""

  # The autoencoder.
  config.model = ConfigDict()
  # Frames per token.
  config.model.tubelet_size = 2
  # Height and width of a token in pixels.
  config.model.patch_size = 16
  # Encoder: embedding width.
  config.model.width = 768
  # Encoder: transformer blocks.
  config.model.depth = 12
  # Encoder: attention heads.
  config.model.num_heads = 12
  # Encoder: hidden units of each MLP.
  config.model.mlp_dim = 3072
  # Decoder: embedding width.
  config.model.dec_width = 384
  # Decoder: transformer blocks.
  config.model.dec_depth = 4
  # Decoder: attention heads.
  config.model.dec_num_heads = 6
  # Decoder: hidden units of each MLP.
  config.model.dec_mlp_dim = 1536
  # Start with a grey prediction instead of noise. True saves short runs the
  # steps in which they learn the mean colour.
  config.model.start_grey = False

  config.mask = ConfigDict()
  # fasking, fasking_opp (reversed order of regions), random, tube, frame, or
  # crfr_p: one region hidden whole, the rest in proportion (FSFM).
  config.mask.strategy = "fasking"
  # Share of the tokens that are masked.
  config.mask.ratio = 0.9
  # Share of the masked tokens that a step does not reconstruct, which saves
  # decoder compute. VideoMAE V2 uses 0.5, MARLIN 0.
  config.mask.decoder_ratio = 0.0

  config.target = ConfigDict()
  # Reconstruct each token normalised by its own mean and deviation per colour,
  # as VideoMAE does; MARLIN does not.
  config.target.norm_pix = False
  # Share of the loss on motion: the frames of a token after its first are
  # reconstructed as differences from it. MAE-DFER uses 0.5, MARLIN 0: all
  # frames as they are.
  config.target.motion_weight = 0.0

  config.loss = ConfigDict()
  # Weight of the reconstruction loss; 0: other objectives alone train the
  # network.
  config.loss.pixel_weight = 1.0
  # Weight of a second reconstruction loss, on the region that crfr_p hides
  # whole. FSFM uses 0.007.
  config.loss.region_weight = 0.0

  # Latent targets: the decoder predicts for the masked tokens the features that
  # a teacher computes from the whole clip.
  config.teacher = ConfigDict()
  # Weight of the loss; 0: no teacher.
  config.teacher.weight = 0.0
  # A workdir, or any checkpoint that marlin_jax.convert reads, of an encoder of
  # any width and depth (SALT, distillation); or 'ema': the moving average of
  # the run's own weights (V-JEPA).
  config.teacher.path = ""
  # Numbers of the teacher's blocks, from 1, whose outputs are predicted, such
  # as '6,12'. '': the last.
  config.teacher.layers = ""

  # Sound beside video, from data sets prepared with --sound (HiCMAE).
  config.sound = ConfigDict()
  # Weight of the loss; 0: sound is not read.
  config.sound.weight = 0.0
  # Share of the sound's tokens that are masked.
  config.sound.mask_ratio = 0.8
  # Encoder of sound: embedding width; its MLPs are four times as wide.
  config.sound.width = 384
  # Encoder of sound: transformer blocks.
  config.sound.depth = 10
  # Encoder of sound: attention heads.
  config.sound.num_heads = 6
  # Decoder of sound: embedding width, likewise.
  config.sound.dec_width = 192
  # Decoder of sound: transformer blocks.
  config.sound.dec_depth = 4
  # Decoder of sound: attention heads.
  config.sound.dec_num_heads = 3
  # Weight of the contrast between the video and the sound of a clip, within the
  # loss; 0: reconstruction alone.
  config.sound.contrast_weight = 0.0025
  # Divides the cosines of the contrast.
  config.sound.temperature = 0.07

  # Contrast: clips of one person are alike and unlike those of others. It needs
  # such clips in a row: data.draws_per_unit, data.sample_by.
  config.contrast = ConfigDict()
  # Weight of the loss; 0: no contrast. CAN uses 0.03, with loss.pixel_weight
  # 0.67.
  config.contrast.weight = 0.0
  # Divides the cosines; SimCLR and CAN use 0.1.
  config.contrast.temperature = 0.1
  # Width of the projection that is compared.
  config.contrast.dim = 128

  # A guard against collapse: every feature is to vary from clip to clip, and no
  # two together (VICReg's terms, which C-JEPA adds to latent targets).
  config.variance = ConfigDict()
  # Weight of the loss; 0: none. VICReg has 25 times the weight of its third
  # term, which is the teacher's here.
  config.variance.weight = 0.0
  # Weight of the covariances in it; 1/25 in VICReg.
  config.variance.covariance_weight = 0.04

  config.input = ConfigDict()
  # Normalise the input with ImageNet's mean and deviation, as VideoMAE does;
  # MARLIN does not.
  config.input.imagenet_norm = False

  # The discriminator. VideoMAE's baseline is mask.strategy=tube, adv.weight=0.
  config.adv = ConfigDict()
  # Weight of the adversarial loss; 0: no discriminator.
  config.adv.weight = 0.01
  # Hidden units of the discriminator, 4 x dec_width.
  config.adv.hidden = 1536
  # Weight of the gradient penalty in the discriminator's loss.
  config.adv.gp_weight = 0.0
  # Updates of the discriminator per step, all at the step's learning rate.
  config.adv.d_steps = 1
  # Updates of the autoencoder per step, likewise.
  config.adv.g_steps = 1
  # Limit of the adversarial gradient, as a multiple of the reconstruction
  # gradient; 0: no limit. The metric train/adv_pull is the ratio it limits.
  config.adv.max_pull = 0.0

  # AdamW, with a linear warm-up.
  config.optim = ConfigDict()
  # Peak learning rate at batch 256; it is scaled with the batch size.
  config.optim.base_lr = 1.5e-4
  # Final learning rate at batch 256, scaled likewise.
  config.optim.min_lr = 1e-5
  # Rate after the warm-up: cosine, which falls to min_lr at the last step; or
  # constant, for runs of unknown length: the number of steps may then change
  # when the run resumes.
  config.optim.schedule = "cosine"
  # Share of the steps spent on warm-up; 0.02 is 40 of 2000 epochs.
  config.optim.warmup_ratio = 0.02
  # Steps of the warm-up, in place of the share; 0: the share.
  config.optim.warmup_steps = 0
  # Last steps of a constant schedule, over which the rate falls linearly to
  # min_lr.
  config.optim.cooldown_steps = 0
  # Factor of the encoder's learning rate from each block to the one before, for
  # warm starts; 1: all rates are equal. BEiT uses 0.65 to 0.95.
  config.optim.layer_decay = 1.0
  # Decay of the first moment.
  config.optim.b1 = 0.9
  # Decay of the second moment.
  config.optim.b2 = 0.95
  # Added to the root of the second moment.
  config.optim.eps = 1e-8
  # Decoupled weight decay.
  config.optim.weight_decay = 0.0
  # Parameters that decay: all, or kernels: no norms, biases and mask token, as
  # in VideoMAE.
  config.optim.decay_params = "all"
  # Dtype of the first moment; bfloat16 halves its memory.
  config.optim.mu_dtype = "float32"
  # Limit of the norm of each network's gradient; larger ones are scaled down.
  # 0: no limit. VideoMAE V2 uses 0.02, MAE-ST 0.02.
  config.optim.clip_norm = 0.0
  # A step is not applied if its reconstruction loss or gradient norm is more
  # than this number of standard deviations above the mean of the last 128
  # steps; OLMo uses 6. 0: no limit.
  config.optim.spike_sigmas = 0.0
  # Decay of the moving average of the weights, which evaluation and export use;
  # 0: no average.
  config.ema_decay = 0.0
  # Limit the decay to (1 + t) / (10 + t) at update t. Without that, the average
  # is mostly the random start for the first 1 / (1 - ema_decay) steps.
  config.ema_warmup = False
  # Steps in a row with a loss or gradient that is not finite, after which the
  # run ends. Such steps are not applied.
  config.max_skipped_steps = 10

  # Dtype of matmuls; bfloat16 on TPU and GPU.
  config.dtype = "float32"
  # Precision of float32 matmuls: default, the fastest, which rounds their
  # inputs to bfloat16 on TPU and to TF32 on GPU; high; or highest: float32.
  config.matmul_precision = "default"
  # With dtype=bfloat16 on several devices: compute gradients of weights, and
  # sum them over devices, in float32. It doubles the bytes exchanged.
  config.float32_sums = False
  # auto, cudnn (GPU, bfloat16), flash (TPU), by_head (CPU), chunked (any
  # device) or plain (most memory). auto: the first that the device supports.
  config.attention = "auto"
  # Loop over the blocks: compiles faster, runs slower.
  config.scan = False
  # Rematerialisation: none, dots or full; less memory, more compute.
  config.remat = "none"

  # The same bits in every run also on NVIDIA GPUs, where XLA's fastest programs
  # are not deterministic; slower.
  config.deterministic = False
  # Folder of compiled programs, local or gs://, which make a restart quick.
  # auto: JAX_COMPILATION_CACHE_DIR or WORKDIR/compiled; '': none.
  config.compilation_cache = "auto"

  # The product of the three is the number of devices.
  config.mesh = ConfigDict()
  # Data parallelism: devices that split the batch. -1: all remaining devices.
  config.mesh.data = -1
  # Fully sharded data parallelism: devices that split batch and weights.
  config.mesh.fsdp = 1
  # Tensor parallelism: devices that split heads and hidden units.
  config.mesh.tensor = 1

  # Several processes that train together, each with its own devices.
  config.distributed = ConfigDict()
  # host:port of process 0; 'auto': ask the cluster (TPU, Slurm, Kubernetes,
  # Open MPI); 'none': a single process; '': as the environment says that srun,
  # Open MPI or a TPU pod sets, or JAX_COORDINATOR_ADDRESS. docs/TRAINING.md.
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

  # Steps from one line of metrics to the next.
  config.log_steps = 10
  # Where metrics and pictures go beside metrics.jsonl, comma-separated:
  # tensorboard, wandb (Weights & Biases), trackio.
  config.trackers = "tensorboard"
  # Steps from one evaluation of the reconstruction loss to the next.
  config.eval_steps = 1000
  # Batches of an evaluation.
  config.eval_batches = 4
  # Steps from one picture of reconstructions to the next.
  config.picture_steps = 1000
  # Clips in a picture.
  config.picture_clips = 2

  # A linear probe and nearest neighbours on the features of labelled videos,
  # fitted during training. They use the moving average of the weights if there
  # is one.
  config.probe = ConfigDict()
  # Steps from one probe to the next; 0: no probe.
  config.probe.steps = 0
  # Data set with labels; '': the first of data.path.
  config.probe.path = ""
  # Label to predict, of kind binary or class; the data set's metadata.json
  # lists its labels.
  config.probe.label = ""
  # Split that the probe is fitted on.
  config.probe.split = "train"
  # Split that the probe is scored on.
  config.probe.eval_split = "val"
  # Most videos of each of the two splits.
  config.probe.num_videos = 512
  # Most windows of each video.
  config.probe.num_windows = 2
  # Windows that are encoded at once, over all devices.
  config.probe.batch_size = 16
  # Features of a window: grid, the tokens' means over 4 x 4 cells of the
  # picture, which keep where things are; or mean, over all tokens.
  config.probe.pool = "grid"
  # Blocks of the encoder to run, from the first one; 0: all. Linear probes may
  # find more in the middle.
  config.probe.num_blocks = 0
  # L2 penalty of the linear probe. It is not tuned on eval_split.
  config.probe.penalty = 1e-2
  # Number of nearest neighbours.
  config.probe.k = 20

  # Steps from one checkpoint to the next; 0: checkpoint_minutes alone decides.
  config.checkpoint_steps = 1000
  # Minutes from one checkpoint to the next; 0: checkpoint_steps alone decides.
  config.checkpoint_minutes = 0.0
  # Most recent checkpoints to keep.
  config.keep_checkpoints = 3
  # Steps from one checkpoint that is kept for good to the next; 0: none.
  config.keep_every_steps = 0
  # Metric of an evaluation, such as eval/val/loss_pixels: the checkpoint with
  # its best value is saved and kept, and opens as WORKDIR/best. '': none.
  config.best_metric = ""
  # Whether the best value is the lowest (min) or the highest (max).
  config.best_mode = "min"

  # A device profile; `kill -USR1 PID` takes one at any time.
  config.profile = ConfigDict()
  # First step to profile; 0: none.
  config.profile.start_step = 0
  # Steps in a profile.
  config.profile.num_steps = 3
  return config
