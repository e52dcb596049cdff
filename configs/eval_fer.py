"""Emotion and sentiment on CMU-MOSEI.

Paper: MARLIN, CVPR 2023, section 4.2: accuracy 80.60 for emotion and 73.70 for
sentiment, with B. The authors released no code for it, and do not say what
their accuracy averages over. Not yet run here.

  python -m data_prep.prepare --dataset=mosei --input=MOSEI --output=DATA
  python -m marlin_jax.eval.fer --config=configs/eval_fer.py \
    --checkpoint=runs/b --data=DATA --workdir=runs/fer

Most labels are 0, so look at the balanced accuracy and the AUC, and compare the
accuracy with that of the row 'constant'.
"""

from configs import eval_far


def get_config():
  config = eval_far.get_config()
  # 'emotion': presence of each of six emotions. Others are 'sentiment_value',
  # the number, and seven classes: 'sentiment7', 'sentiment7_delbrouck'.
  config.tasks = "emotion,sentiment"

  # Sentiment is a value from -3 to 3: negative or not, or rounded.
  config.derive.sentiment = {"label": "sentiment", "cuts": (0.0,)}
  config.derive.sentiment7 = {
    "label": "sentiment",
    "cuts": (-2.5, -1.5, -0.5, 0.5, 1.5, 2.5),
  }
  # The row of most papers: MAE, Pearson, 7 classes by rounding, 2 classes.
  config.derive.sentiment_value = {"label": "sentiment", "scale": (-3.0, 3.0)}
  # Seven classes of Delbrouck et al. (2020), with 0 apart.
  config.derive.sentiment7_delbrouck = {
    "label": "sentiment",
    "cuts": (-2.0, -1.0, 1.0, 2.0),
    "apart": 0.0,
  }
  return config
