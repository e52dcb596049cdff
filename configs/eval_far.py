"""Facial attributes on CelebV-HQ: 40 of appearance, 35 of action.

Paper: MARLIN, CVPR 2023, section 4.2, and the authors' code: accuracy 93.90 and
AUC 0.9561 for appearance, 95.48 and 0.9406 for action. Not yet run here.

  python -m data_prep.prepare --dataset=celebvhq --input=CELEBVHQ --output=DATA
  python -m marlin_jax.eval.far --config=configs/eval_far.py \
    --checkpoint=runs/b --data=DATA --workdir=runs/far

Add --config.protocol=paper for numbers that compare with the paper's, and
--config.modes=finetune to fine-tune the whole encoder. --config.tasks=LABEL
evaluates a task of your own, on any data set prepared with labels.
"""

from ml_collections import ConfigDict


def get_config():
  config = ConfigDict()
  # Comma-separated labels of the data set, or names in `derive`. Each task gets
  # its own head.
  config.tasks = "appearance,action"
  # Comma-separated: linear, attentive, knn, knn_centred (frozen encoder);
  # layernorm, lora (a small part of it is trained); finetune (all of it).
  config.modes = "linear"
  # 'default' or 'paper'; see marlin_jax/downstream/protocols.py.
  config.protocol = "default"
  # How the features of a video's windows become one vector: mean, std or
  # mean_std.
  config.pool = "mean"
  # Loss of numbers in trainings: 'mse', or 'ccc', 1 - CCC of the batch.
  config.value_loss = "mse"
  # Repetitions with other subsets of the training data and other initial heads.
  config.num_seeds = 3

  config.data = ConfigDict()
  # Split to train on; several as fold1+fold2.
  config.data.train = "train"
  # Split on which penalties, rounds and thresholds are chosen.
  config.data.val = "val"
  # Split to score.
  config.data.test = "test"
  # Splits of other data sets to score too, PATH:SPLIT, comma-separated. Their
  # task has the same name; thresholds stay those of `val`.
  config.data.tests = ""
  # Classes to train and choose on beside the negative one, comma-separated; '':
  # all. Scores are of all classes, and of each: of unseen ones too.
  config.data.train_classes = ""
  # Cross-validation in place of train, val and test: names of splits,
  # 'fold1,fold2'; groups of people, 'people:5'; 'leave_person_out'; of positive
  # classes, 'leave_class_out' or 'single_class'. See
  # marlin_jax/downstream/folds.py.
  config.data.folds = ""
  # Share of the people in the training folds on which choices are made.
  config.data.fold_val = 0.1
  # Compose each batch of pairs, a video with the label and one without it, of
  # the same person where there is one: for tasks of one label, such as
  # deepfakes.
  config.data.pairs = False
  # Share of the people in the training split; comma-separated for several:
  # --config.data.ratio=0.01,0.1,1.
  config.data.ratio = "1"
  # Use all face tracks of a video; False: the main face.
  config.data.all_tracks = False
  # Most windows of a video that are scored after each round of a training,
  # spread over it; 0: all. Thresholds and final scores are of all windows.
  config.data.val_windows = 0
  # Reader threads.
  config.data.num_threads = 4

  # Tasks made from other labels; see configs/eval_fer.py and eval_dfd.py.
  config.derive = ConfigDict()

  # --- protocol=default -------------------------------------------------------

  # Logistic regression on standardised features, solved to the optimum.
  config.linear = ConfigDict()
  # L2 penalties to choose from on the validation split, for each label by
  # itself. The grid grows while the best one is its first or last.
  config.linear.penalties = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
  # Most iterations of the solver.
  config.linear.max_iterations = 1000

  # Nearest neighbours, as DINO; knn_centred: less the mean of the training.
  config.knn = ConfigDict()
  # Number of neighbours.
  config.knn.k = 20
  # Temperature of the softmax over cosines that weights the neighbours.
  config.knn.temperature = 0.07

  # One learned query on the tokens of the frozen encoder; V-JEPA's optimiser.
  config.attentive = ConfigDict()
  # Videos per step.
  config.attentive.batch_size = 32
  # Length of the training in epochs.
  config.attentive.epochs = 20.0
  # Least number of steps, for small shares of the data.
  config.attentive.min_steps = 500
  # Times that the validation split is scored; the best round counts.
  config.attentive.num_rounds = 10
  # Peak learning rate at batch 256; it is scaled with the batch size.
  config.attentive.base_lr = 1e-3
  # Final learning rate at batch 256, scaled likewise.
  config.attentive.min_lr = 1e-6
  # Share of the steps spent on warm-up.
  config.attentive.warmup_ratio = 0.05
  # Decoupled weight decay.
  config.attentive.weight_decay = 0.01
  # Decay of the first moment.
  config.attentive.b1 = 0.9
  # Decay of the second moment.
  config.attentive.b2 = 0.999
  # Added to the root of the second moment.
  config.attentive.eps = 1e-8
  # Mirror half of the clips.
  config.attentive.flip = True

  # The whole encoder: AdamW with layer-wise rates, stochastic depth, mixup and
  # flips. VideoMAE's recipe for small data sets has more: RandAugment, random
  # erasing and crops, CutMix, label smoothing, repeated augmentation.
  config.finetune = ConfigDict()
  # Videos per step.
  config.finetune.batch_size = 32
  # Length of the training in epochs.
  config.finetune.epochs = 30.0
  # Least number of steps, for small shares of the data.
  config.finetune.min_steps = 500
  # Times that the validation split is scored; the best round counts.
  config.finetune.num_rounds = 10
  # Peak learning rate at batch 256; it is scaled with the batch size.
  config.finetune.base_lr = 1e-3
  # Final learning rate at batch 256, scaled likewise.
  config.finetune.min_lr = 1e-6
  # Share of the steps spent on warm-up.
  config.finetune.warmup_ratio = 0.1
  # Decoupled weight decay.
  config.finetune.weight_decay = 0.05
  # Decay of the first moment.
  config.finetune.b1 = 0.9
  # Decay of the second moment.
  config.finetune.b2 = 0.999
  # Added to the root of the second moment.
  config.finetune.eps = 1e-8
  # Factor of the learning rate from each layer to the one before it.
  config.finetune.layer_decay = 0.75
  # Largest probability of dropping a block (stochastic depth).
  config.finetune.drop_path = 0.1
  # Alpha of mixup; 0: no mixup.
  config.finetune.mixup = 0.8
  # Mirror half of the clips.
  config.finetune.flip = True

  # Light tuning, modes layernorm and lora: a small part of the encoder, and a
  # linear head.
  config.light = ConfigDict()
  # Videos per step.
  config.light.batch_size = 32
  # Length of the training in epochs.
  config.light.epochs = 30.0
  # Least number of steps, for small shares of the data.
  config.light.min_steps = 500
  # Times that the validation split is scored; the best round counts.
  config.light.num_rounds = 10
  # Peak learning rate at batch 256; it is scaled with the batch size.
  config.light.base_lr = 5e-3
  # Final learning rate at batch 256, scaled likewise.
  config.light.min_lr = 1e-6
  # Share of the steps spent on warm-up.
  config.light.warmup_ratio = 0.1
  # Decoupled weight decay of the head.
  config.light.weight_decay = 0.01
  # Decay of the first moment.
  config.light.b1 = 0.9
  # Decay of the second moment.
  config.light.b2 = 0.999
  # Added to the root of the second moment.
  config.light.eps = 1e-8
  # Largest probability of dropping a block (stochastic depth).
  config.light.drop_path = 0.0
  # Alpha of mixup; 0: no mixup.
  config.light.mixup = 0.0
  # Mirror half of the clips.
  config.light.flip = True

  # Adapters of mode lora, on the projections to queries and values.
  config.lora = ConfigDict()
  # Rank of an adapter.
  config.lora.rank = 8
  # An adapter is scaled by alpha / rank.
  config.lora.alpha = 16.0

  # --- protocol=paper ---------------------------------------------------------

  # Recipe of linear, attentive and finetune alike.
  config.paper = ConfigDict()
  # Videos per step.
  config.paper.batch_size = 32
  # Most epochs.
  config.paper.max_epochs = 2000
  # Initial learning rate.
  config.paper.lr = 1e-4
  # Decay of the first moment.
  config.paper.b1 = 0.5
  # Decay of the second moment.
  config.paper.b2 = 0.9
  # Added to the root of the second moment.
  config.paper.eps = 1e-8
  # Epochs without a lower training loss before the learning rate falls.
  config.paper.patience = 7
  # Factor by which the learning rate falls.
  config.paper.factor = 0.5
  # The training ends at this learning rate.
  config.paper.stop_lr = 1e-6

  # --- Scores -----------------------------------------------------------------

  # Bootstrap resamples of the people, for the 95% intervals.
  config.num_resamples = 1000
  # Keep the trained models, for marlin_jax.predict.
  config.keep_models = True
  # Draw curves as PNG, if matplotlib is installed.
  config.plots = True

  # --- Encoder ----------------------------------------------------------------

  # Features from elsewhere in place of --checkpoint, for linear and knn: a
  # folder, .npz, .parquet or .csv; see marlin_jax/downstream/feature_table.py.
  config.features = ""

  # The encoder of --checkpoint=random, the baseline of every probe: ViT-B/16.
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
  # A clip shows every stride-th frame.
  config.random.stride = 2
  # Side of a frame in pixels, at most 224.
  config.random.image_size = 224
  # Frames per token.
  config.random.tubelet_size = 2
  # Side of a patch in pixels.
  config.random.patch_size = 16

  # Clips that are encoded at once where nothing is trained.
  config.batch_size = 16
  # Clips per device in one microbatch of a training; 0: as many as are
  # estimated to fit. The result is the same to rounding.
  config.clips_per_device = 0
  # Folder for features, which several runs may share; '': in the workdir.
  config.cache = ""
  # Dtype of matmuls; bfloat16 on TPU and GPU.
  config.dtype = "float32"
  # As in configs/pretrain_b.py.
  config.attention = "auto"
  # As in configs/pretrain_b.py.
  config.remat = "none"

  # As in configs/pretrain_b.py.
  config.mesh = ConfigDict()
  # Devices that split the batch; -1: all remaining devices.
  config.mesh.data = -1
  # Devices that split batch and weights.
  config.mesh.fsdp = 1
  # Devices that split heads and hidden units.
  config.mesh.tensor = 1

  # As in configs/pretrain_b.py: several processes that evaluate together.
  config.distributed = ConfigDict()
  # host:port of process 0; 'auto', 'none' or ''.
  config.distributed.coordinator = ""
  # Number of processes; only with host:port.
  config.distributed.num_processes = 0
  # Number of this process, from 0; only with host:port.
  config.distributed.process_id = 0
  # How long to wait for the other processes to start.
  config.distributed.timeout_secs = 300
  return config
