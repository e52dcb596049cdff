#!/usr/bin/env bash
# Trains on Slurm with one process per GPU, on any number of nodes.
#
# Start it from the repository. All nodes must see the repository, the data set
# and the workdir:
#   sbatch --nodes=4 tools/slurm.sh --config=configs/pretrain_b.py \
#     --config.data.path=/shared/DATASET --workdir=/shared/runs/b
#
# Options before tools/slurm.sh replace the #SBATCH lines below. Flags after it
# go to marlin_jax.train and must include --workdir.
#
# Five minutes before the time limit, and when the job is preempted with a grace
# time, Slurm sends SIGTERM to the processes: the run saves and ends. This script
# then requeues the job. It also requeues a run that ended early, but not one that
# was refused (exit code 1), and at most MAX_RESTARTS (20) times. After a node
# failure Slurm itself requeues the job.
#
#SBATCH --job-name=marlin
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# Use as many tasks as GPUs: process i of a node takes GPU i. Set neither
# --gpus-per-task nor --gpu-bind, so that each process sees all GPUs.
set -euo pipefail

max_restarts=${MAX_RESTARTS:-20}
python=${PYTHON:-.venv/bin/python}

cd "${SLURM_SUBMIT_DIR:?is not set: start this script with sbatch}"
if [[ ! -d marlin_jax ]]; then
  echo "error: no marlin_jax in $PWD: run sbatch from the repository" >&2
  exit 1
fi
if [[ " $*" != *" --workdir="* ]]; then
  echo "error: no --workdir=FOLDER after tools/slurm.sh: a requeued run must" \
    "find its checkpoints" >&2
  exit 1
fi

# Without --kill-on-bad-exit=0 some clusters send SIGTERM to the remaining
# processes when one fails, which would look like a signal to the whole job.
code=0
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
{ srun --label --kill-on-bad-exit=0 \
  "$python" -m marlin_jax.train "$@" 2>&1 >&3 | tee "$errors" >&2; } 3>&1 ||
  code=$?
# srun returns the highest code. A process that was refused may have been alone
# in noticing it, and the others aborted.
if grep -qE '^srun: error: .*: Exited with exit code 1$' "$errors"; then
  code=1
fi

restarts=${SLURM_RESTART_COUNT:-0}
# A cancelled job gets SIGTERM too, but its state is no longer RUNNING.
state=$(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID" || true)
if ((code > 1 && restarts < max_restarts)) && [[ $state = RUNNING ]]; then
  echo "ended with $code: restart $((restarts + 1)) of $max_restarts at most"
  # Fails after `scontrol update JobId=... Requeue=0`, which is intended.
  scontrol requeue "$SLURM_JOB_ID" || true
fi
exit "$code"
