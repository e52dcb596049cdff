#!/usr/bin/env bash
# Trains on Slurm: one process per GPU, on as many nodes as are asked for.
#
# From the repository, which all nodes must see, as they must the data set and
# the workdir:
#   sbatch --nodes=4 tools/slurm.sh --config=configs/pretrain_b.py \
#     --config.data.path=/shared/DATASET --workdir=/shared/runs/b
#
# What stands before tools/slurm.sh replaces the #SBATCH lines below; what
# stands after it goes to marlin_jax.train, and there a --workdir must be.
#
# Five minutes before the time is up, and when the job is preempted with a
# grace time, Slurm sends SIGTERM to the processes: the run saves and ends. This
# script then has the job queued again, as it does when the run breaks off, but
# not when it is refused, which ends it with 1, and MAX_RESTARTS (20) times at
# most. When a node fails, Slurm itself queues the job again.
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
# As many tasks as GPUs: process i of a node takes its GPU i. So that each sees
# all of them, give neither --gpus-per-task nor --gpu-bind.
set -euo pipefail

max_restarts=${MAX_RESTARTS:-20}
python=${PYTHON:-.venv/bin/python}

cd "${SLURM_SUBMIT_DIR:?is not set: start this script with sbatch}"
if [[ ! -d marlin_jax ]]; then
  echo "error: no marlin_jax in $PWD: run sbatch from the repository" >&2
  exit 1
fi
if [[ " $*" != *" --workdir="* ]]; then
  echo "error: no --workdir=FOLDER after tools/slurm.sh: a run that is queued" \
    "again must find what it has saved" >&2
  exit 1
fi

# Without --kill-on-bad-exit=0 some clusters send SIGTERM to the processes that
# are left when one ends with an error, which would look like a signal to all.
code=0
srun --label --kill-on-bad-exit=0 \
  "$python" -m marlin_jax.train "$@" || code=$?

restarts=${SLURM_RESTART_COUNT:-0}
# A job that was cancelled gets SIGTERM too, but no longer runs.
state=$(squeue --noheader --format=%T --jobs="$SLURM_JOB_ID" || true)
if ((code > 1 && restarts < max_restarts)) && [[ $state = RUNNING ]]; then
  echo "ended with $code: restart $((restarts + 1)) of $max_restarts at most"
  # Refused after `scontrol update JobId=... Requeue=0`: it is not wanted.
  scontrol requeue "$SLURM_JOB_ID" || true
fi
exit "$code"
