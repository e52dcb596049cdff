"""MARLIN ViT-B/16, the paper's pretraining recipe.

Paper: MARLIN, CVPR 2023 (arXiv 2211.06627), section 4 and the authors' code.
Data: YouTube Faces, 2,593 training videos; 2000 epochs are 162,063 steps.
Hardware there: 2x A6000, 32 clips per step, float32. Not yet run whole here.

  python -m marlin_jax.train --config=configs/pretrain_b.py \
    --config.data.path=DATASET --workdir=runs/b

Where the recipe differs from the authors': the learning rate moves every step
instead of every epoch, and weights start at random unless init_from names a
VideoMAE checkpoint, as theirs did.
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  config.seed = 0

  # Clips per step over all devices. It is kept on devices too small for it:
  # gradients are then accumulated over parts of the batch.
  config.batch_size = 32
  config.clips_per_device = (
    0  # at once; 0: as many as memory is thought to hold
  )
  # Exactly one of the two is above 0. An epoch is as many clips as there are
  # source videos, whatever data.clips_per_record is.
  config.num_epochs = 2000.0
  config.num_steps = 0

  config.data = ConfigDict()
  # A directory written by data_prep.prepare; 'sample' is a tiny real data set
  # that is prepared on first use.
  config.data.path = "sample"
  config.data.split = "train"
  config.data.eval_split = "train"  # better: 'val', where there is one
  # Tracks of a lower quality are left out of training, but not of evaluation;
  # docs/DATA.md says what it measures. 0: none.
  config.data.min_quality = 0.0
  config.data.num_frames = 16
  config.data.stride = 2
  # Above 1: repeated sampling, so many clips of each record that is read. Less
  # to read and decode for each; batch_size is a multiple of it.
  config.data.clips_per_record = 1
  config.data.num_threads = 2
  # Records that may be unreadable: each is told of, and another taken instead.
  config.data.max_bad_records = 0

  # Weights to start from: the workdir of a run, or whatever
  # `python -m marlin_jax.convert` reads, e.g. VideoMAE's .pth. "": random.
  config.init_from = ""
  # Keys, with commas between, that may differ from the run that is resumed.
  config.allow_change = ""

  config.model = ConfigDict()
  config.model.tubelet_size = 2
  config.model.width = 768
  config.model.depth = 12
  config.model.num_heads = 12
  config.model.mlp_dim = 3072
  config.model.dec_width = 384
  config.model.dec_depth = 4
  config.model.dec_num_heads = 6
  config.model.dec_mlp_dim = 1536
  config.model.start_grey = False  # True helps short runs

  config.mask = ConfigDict()
  config.mask.strategy = "fasking"  # fasking_opp, random, tube, frame
  config.mask.ratio = 0.9
  # Share of the hidden tokens that a step does not reconstruct: less work for
  # the decoder, which is most of it. VideoMAE V2 has 0.5, MARLIN 0.
  config.mask.decoder_ratio = 0.0

  # VideoMAE's conventions; MARLIN uses neither.
  config.target = ConfigDict()
  config.target.norm_pix = False
  config.input = ConfigDict()
  config.input.imagenet_norm = False

  # VideoMAE's baseline is mask.strategy=tube with adv.weight=0.
  config.adv = ConfigDict()
  config.adv.weight = 0.01
  config.adv.hidden = 1536  # 4 x dec_width
  config.adv.gp_weight = 0.0
  config.adv.d_steps = 1
  config.adv.g_steps = 1
  # Limit of the adversarial gradient, in reconstruction gradients; 0: none.
  # adv_pull in the metrics is what it would act on.
  config.adv.max_pull = 0.0

  config.optim = ConfigDict()
  config.optim.base_lr = 1.5e-4  # at batch 256, scaled with the batch
  config.optim.min_lr = 1e-5  # likewise
  config.optim.warmup_ratio = 0.02  # 40 of 2000 epochs
  config.optim.b1 = 0.9
  config.optim.b2 = 0.95
  config.optim.eps = 1e-8
  config.optim.weight_decay = 0.0
  config.optim.mu_dtype = "float32"  # of Adam's first moment; bfloat16: half
  # Of an average of the weights, for evaluation and export; 0: none is kept.
  config.ema_decay = 0.0
  # Steps in a row without a finite loss and gradient; none of them is applied.
  config.max_skipped_steps = 10

  config.dtype = "float32"  # of matmuls; bfloat16 on TPU and GPU
  # cudnn (GPU, bfloat16), flash (TPU), by_head (CPU), chunked (anywhere), plain
  # (the most memory); auto: the first of these that fits.
  config.attention = "auto"
  config.scan = False  # loop over blocks: compiles faster, runs slower
  config.remat = "none"  # dots, full: less memory, more arithmetic

  config.mesh = ConfigDict()
  config.mesh.data = -1  # devices that share the batch; -1: all others
  config.mesh.fsdp = 1  # these share the batch too, and the weights
  config.mesh.tensor = 1  # these share every clip's heads and hidden units

  # Several processes, each with devices of its own, that train together.
  config.distributed = ConfigDict()
  # host:port of process 0; 'auto': ask the cluster (TPU, Slurm, Kubernetes,
  # Open MPI); 'none': alone; '': as JAX_COORDINATOR_ADDRESS or Slurm say.
  config.distributed.coordinator = ""
  config.distributed.num_processes = 0  # with host:port only
  config.distributed.process_id = 0
  config.distributed.timeout_secs = 300  # to wait for the others to start

  # Seconds without the end of a step, a save or an evaluation; 0: for ever.
  config.watchdog = ConfigDict()
  config.watchdog.dump_secs = 900.0  # then the stacks of all threads are shown
  config.watchdog.exit_secs = 3600.0  # then the run ends, to be started again

  config.log_steps = 10
  config.eval_steps = 1000
  config.eval_batches = 4
  config.picture_steps = 1000
  config.picture_clips = 2
  # What the encoder knows already: a linear probe and nearest neighbours on
  # features of labelled videos, with the average of the weights where one is
  # kept.
  config.probe = ConfigDict()
  config.probe.steps = 0  # from one to the next; 0: none
  config.probe.path = ""  # a data set with labels; "": that of data.path
  config.probe.label = ""  # of its metadata.json; no value, but bits or classes
  config.probe.split = "train"  # the probe learns from it
  config.probe.eval_split = "val"  # and is scored on it
  config.probe.num_videos = 512  # of each of the two, at most
  config.probe.num_windows = 2  # of each video, at most
  config.probe.batch_size = 16  # windows at a time, over all devices
  config.probe.penalty = 1e-2  # of the probe: nothing is chosen on eval_split
  config.probe.k = 20  # neighbours
  config.checkpoint_steps = 1000
  config.keep_checkpoints = 3

  # Of the devices, from a step on; `kill -USR1 PID` takes one at any time.
  config.profile = ConfigDict()
  config.profile.start_step = 0  # 0: none
  config.profile.num_steps = 3
  return config
