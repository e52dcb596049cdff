"""Facial expression: the emotions and the sentiment of CMU-MOSEI.

  python -m marlin_jax.eval.fer --config=configs/eval_fer.py \\
    --checkpoint=runs/b --data=DATASET --workdir=runs/fer

Any value of the configuration can be overridden: --config.modes=linear,finetune
--config.data.ratio=0.01,0.1,1 --config.protocol=paper. The workdir then holds
results.json with every number, results.txt with the table, predictions/ per
video and plots/. It may be stopped at any moment: the same command goes on.
"""

from absl import flags

from marlin_jax.eval import command

flags.adopt_module_key_flags(command)

if __name__ == "__main__":
  command.run(command.main)
