"""Facial attributes on CelebV-HQ: 40 of appearance, 35 of action.

Paper: MARLIN, CVPR 2023, section 4.2, and the authors' code: accuracy 93.90 and
AUC 0.9561 for appearance, 95.48 and 0.9406 for action. Not yet run here.

  python -m data_prep.prepare --dataset=celebvhq --input=CELEBVHQ --output=DATA
  python -m marlin_jax.eval.far --config=configs/eval_far.py \
    --checkpoint=runs/b --data=DATA --workdir=runs/far

Add --config.protocol=paper for the numbers to be compared with the paper's, and
--config.modes=finetune for those of the whole encoder. A task of one's own is
--config.tasks=LABEL on any data set prepared with labels.
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  # Labels of the data set, each with a head of its own; or keys of `derive`.
  config.tasks = "appearance,action"
  # linear, attentive: the encoder is frozen; finetune: it is not; knn.
  config.modes = "linear"
  config.protocol = "default"  # or 'paper'; see marlin_jax/downstream/protocols
  # The feature of a video from those of its windows: mean, std, mean_std.
  config.pool = "mean"
  # Of the draws of a part of the data, and of heads that start at random.
  config.num_seeds = 3

  config.data = ConfigDict()
  config.data.train = "train"
  config.data.val = "val"  # all choices are made on it
  config.data.test = "test"
  # Of the people in the training split; several: --config.data.ratio=0.01,0.1,1
  config.data.ratio = "1"
  config.data.all_tracks = False  # False: of each video the longest face track
  config.data.num_threads = 4

  # Tasks made of other labels: see configs/eval_fer.py and eval_dfd.py.
  config.derive = ConfigDict()

  # --- protocol=default -------------------------------------------------------
  # Logistic regression on standardised features, solved to the optimum.
  config.linear = ConfigDict()
  config.linear.penalties = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # chosen on val
  config.linear.max_iterations = 500

  config.knn = ConfigDict()  # DINO's
  config.knn.k = 20
  config.knn.temperature = 0.07

  # One query on the tokens of the frozen encoder; V-JEPA's optimiser.
  config.attentive = ConfigDict()
  config.attentive.batch_size = 32
  config.attentive.epochs = 20.0
  config.attentive.min_steps = 500  # for the smallest parts of the data
  config.attentive.num_rounds = 10  # after each val is scored; the best counts
  config.attentive.base_lr = 1e-3  # at batch 256, scaled with the batch
  config.attentive.min_lr = 1e-6
  config.attentive.warmup_ratio = 0.05
  config.attentive.weight_decay = 0.01
  config.attentive.b1 = 0.9
  config.attentive.b2 = 0.999
  config.attentive.eps = 1e-8
  config.attentive.flip = True  # half of the clips mirrored

  # VideoMAE's recipe for small data sets, in fewer epochs.
  config.finetune = ConfigDict()
  config.finetune.batch_size = 32
  config.finetune.epochs = 30.0
  config.finetune.min_steps = 500
  config.finetune.num_rounds = 10
  config.finetune.base_lr = 1e-3
  config.finetune.min_lr = 1e-6
  config.finetune.warmup_ratio = 0.1
  config.finetune.weight_decay = 0.05
  config.finetune.b1 = 0.9
  config.finetune.b2 = 0.999
  config.finetune.eps = 1e-8
  config.finetune.layer_decay = 0.75  # of the rate, from each layer to the last
  config.finetune.drop_path = 0.1
  config.finetune.mixup = 0.8
  config.finetune.flip = True

  # --- protocol=paper: linear, attentive and finetune alike -------------------
  config.paper = ConfigDict()
  config.paper.batch_size = 32
  config.paper.max_epochs = 2000
  config.paper.lr = 1e-4
  config.paper.b1 = 0.5
  config.paper.b2 = 0.9
  config.paper.eps = 1e-8
  # When the training loss has not fallen for so many epochs.
  config.paper.patience = 7
  config.paper.factor = 0.5
  config.paper.stop_lr = 1e-6

  # Draws of the bootstrap over people that gives the 95% intervals.
  config.num_resamples = 1000
  config.plots = True  # PNG, where matplotlib is installed

  # What --checkpoint=random stands for: the floor of every probe. ViT-B/16.
  config.random = ConfigDict()
  config.random.width = 768
  config.random.depth = 12
  config.random.num_heads = 12
  config.random.mlp_dim = 3072
  config.random.num_frames = 16
  config.random.stride = 2
  config.random.tubelet_size = 2
  config.random.patch_size = 16

  config.batch_size = 16  # clips at a time where nothing is trained
  # Features are kept here; ''; in the workdir. Several runs may share it.
  config.cache = ""
  config.dtype = "float32"  # of matmuls; bfloat16 on TPU and GPU
  config.attention = "auto"  # as in configs/pretrain_b.py
  config.remat = "none"

  config.mesh = ConfigDict()  # as in configs/pretrain_b.py
  config.mesh.data = -1
  config.mesh.fsdp = 1
  config.mesh.tensor = 1
  return config
