"""Facial expression: the emotions and the sentiment of CMU-MOSEI.

  python -m marlin_jax.eval.fer --config=configs/eval_fer.py \\
    --checkpoint=runs/b --data=DATASET --workdir=runs/fer

Flags override values of the configuration: --config.modes=linear,finetune
--config.data.ratio=0.01,0.1,1 --config.protocol=paper. The workdir receives
results.json with all scores, results.txt with a table, predictions/ per video,
models/ for marlin_jax.predict and plots/. The command can be stopped at any
time; run again, it continues.
"""

from absl import flags

from marlin_jax.eval import command

flags.adopt_module_key_flags(command)

if __name__ == "__main__":
  command.run()
