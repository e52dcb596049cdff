"""Deepfakes on FaceForensics++: real or manipulated.

Paper: MARLIN, CVPR 2023, section 4.2: AUC 0.9305 with B, 0.9377 with L, most
likely at the compression c40; see docs/REPRODUCING.md. The authors released no
code for it. Not yet run here.

  python -m data_prep.prepare --dataset=ffpp_c40 --input=FFPP --output=DATA
  python -m marlin_jax.eval.dfd --config=configs/eval_dfd.py \
    --checkpoint=runs/b --data=DATA --workdir=runs/dfd \
    --config.modes=finetune

The task 'deepfake' is trained on all manipulations, and scored on all of them
together and on each one against the real videos. Each of the other tasks uses a
single manipulation: Deepfakes, Face2Face, FaceSwap, NeuralTextures.
"""

from configs import eval_far

METHODS = ("Deepfakes", "Face2Face", "FaceSwap", "NeuralTextures")


def get_config():
  config = eval_far.get_config()
  config.tasks = "deepfake"

  real = {"label": "manipulation", "negative": "original"}
  config.derive.deepfake = real
  for method in METHODS:
    config.derive[method] = real | {"only": method}

  # No mixup: two mixed faces look like a manipulated one.
  config.finetune.mixup = 0.0
  return config
