#!/usr/bin/env bash
# Creates Cloud TPU VMs and trains on them; see `tools/tpu_vm.sh help`.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Files of the repository that a worker needs.
parts=(marlin_jax data_prep configs pyproject.toml setup.py README.md
  LICENSE)
# Longest time that a stopped run may take to save.
stop_secs=600

usage() {
  cat << 'EOF'
Trains on Cloud TPU VMs: one host, a pod slice, or several slices.

  tools/tpu_vm.sh COMMAND [SETTINGS] [-- FLAGS OF marlin_jax.train]

Creates the TPU and trains to the end, through preemptions:

  export TPU_NAME=marlin-b TPU_PROJECT=my-project TPU_ZONE=us-west4-a
  export TPU_ACCELERATOR=v5litepod-16 TPU_CAPACITY=spot
  tools/tpu_vm.sh babysit -- --config=configs/pretrain_b.py \
    --config.dtype=bfloat16 --config.batch_size=256 \
    --config.data.path=gs://BUCKET/DATASET --workdir=gs://BUCKET/runs/b
  tools/tpu_vm.sh delete

Step by step: create, setup, launch -- FLAGS, logs, stop, delete.
With --dry-run a command prints the commands it would run, and runs none.

Commands
  create    requests the TPU as a queued resource and waits until it is active
  setup     copies this working tree to all workers and installs it
  launch    starts the training in the background on all workers
  status    prints the state of the TPU and of each worker
  logs      prints the end of worker 0's log; --worker=all, --follow
  stop      makes the run save and end; returns when all workers have ended
  restart   runs stop, setup and launch; recreates the TPU if it is lost
  babysit   runs until the training has finished: creates the TPU, and recreates
            it when it is SUSPENDED, FAILED or PREEMPTED; restarts a run that
            has ended, unless it was refused (exit code 1, see the log) or ended
            by `stop`
  delete    deletes the TPU; until then it is billed
  help      prints this text

Settings, each followed by its environment variable
  --name=NAME            TPU_NAME
  --project=PROJECT      TPU_PROJECT
  --zone=ZONE            TPU_ZONE
  --accelerator=TYPE     TPU_ACCELERATOR  v4-32, v5litepod-16, v5p-32, v6e-16
  --slices=N             TPU_SLICES       slices of that type; default 1
  --capacity=KIND        TPU_CAPACITY     spot, reserved or on-demand (default)
  --runtime=VERSION      TPU_RUNTIME      software; default: the accelerator's
  --create-flag=FLAG     flag for gcloud's create; may be repeated, e.g.
                         --create-flag=--service-account=NAME@...
  --max-restarts=N       TPU_MAX_RESTARTS restarts by babysit after failures;
                         default 20; preemptions do not count
  --poll-secs=N          TPU_POLL_SECS    time between polls; default 30
  --worker=N --slice=N   worker and slice to print logs of, or all; default 0
  --follow               keeps printing one worker's log
  --dry-run              prints the commands and runs none

Needs gcloud (logged in) and, for several workers, its key in the ssh agent:
  eval "$(ssh-agent)" && ssh-add ~/.ssh/google_compute_engine
The TPU's service account needs read access to the data set's bucket and write
access to the workdir's. TPU7x and later are available on GKE only; see
gke_jobset.yaml.
EOF
}

die() {
  echo "error: $*" >&2
  exit 1
}

say() {
  echo "$(date +%H:%M:%S) $*"
}

# --- settings -----------------------------------------------------------------

name=${TPU_NAME:-}
project=${TPU_PROJECT:-}
zone=${TPU_ZONE:-}
accelerator=${TPU_ACCELERATOR:-}
slices=${TPU_SLICES:-1}
capacity=${TPU_CAPACITY:-on-demand}
runtime=${TPU_RUNTIME:-}
max_restarts=${TPU_MAX_RESTARTS:-20}
poll_secs=${TPU_POLL_SECS:-30}
create_flags=()
worker=0
slice=0
follow=false
dry_run=false
# As given, for the commands that babysit runs.
settings=()
train_flags=()

parse() {
  while (($#)); do
    case $1 in
      --) train_flags=("${@:2}") && return ;;
      --dry-run) dry_run=true ;;
      --follow) follow=true ;;
      --name=*) name=${1#*=} ;;
      --project=*) project=${1#*=} ;;
      --zone=*) zone=${1#*=} ;;
      --accelerator=*) accelerator=${1#*=} ;;
      --slices=*) slices=${1#*=} ;;
      --capacity=*) capacity=${1#*=} ;;
      --runtime=*) runtime=${1#*=} ;;
      --create-flag=*) create_flags+=("${1#*=}") ;;
      --max-restarts=*) max_restarts=${1#*=} ;;
      --poll-secs=*) poll_secs=${1#*=} ;;
      --worker=*) worker=${1#*=} ;;
      --slice=*) slice=${1#*=} ;;
      --config*=* | --workdir=*)
        die "$1: flags of marlin_jax.train go after --" ;;
      *) die "unknown setting $1; settings have the form --name=VALUE, see:" \
        "tools/tpu_vm.sh help" ;;
    esac
    settings+=("$1")
    shift
  done
}

# Args: names of settings that the command needs.
need() {
  local missing=() setting
  for setting in "$@"; do
    [[ -n ${!setting} ]] || missing+=("--$setting=... (or TPU_${setting^^})")
  done
  ((${#missing[@]} == 0)) ||
    die "the command '$command' needs ${missing[*]}; see: tools/tpu_vm.sh help"
  place=("--project=$project" "--zone=$zone" --quiet)
}

check_numbers() {
  local setting
  for setting in slices max_restarts poll_secs; do
    [[ ${!setting} =~ ^[0-9]+$ ]] ||
      die "--${setting//_/-}=${!setting}: expected a number"
  done
  ((slices)) || die "--slices=0: expected at least 1"
}

check_train_flags() {
  local flag workdir='' config=''
  for flag in ${train_flags[@]+"${train_flags[@]}"}; do
    case $flag in
      --workdir=*) workdir=${flag#*=} ;;
      --config=*) config=${flag#*=} ;;
      --dry-run | --name=* | --project=* | --zone=* | --poll-secs=*)
        die "$flag: not a flag of marlin_jax.train; settings go before --" ;;
    esac
  done
  [[ -n $config ]] || die "'$command' needs flags of marlin_jax.train after --," \
    "including --config=configs/...py"
  [[ -f $root/${config%%:*} || -f $root/configs/$config.py ]] ||
    die "--config=$config: no such file in $root, and none in $root/configs"
  [[ $workdir = gs://* ]] || die "--workdir=$workdir: expected gs://..., which" \
    "all workers see and which remains when the TPU is deleted"
}

# Default software versions: cloud.google.com/tpu/docs/runtimes.
choose_runtime() {
  accelerator=${accelerator/#v5e-/v5litepod-}
  [[ -z $runtime ]] || return 0
  case $accelerator in
    v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) die "--accelerator=$accelerator: expected v4-N, v5litepod-N (v5e), v5p-N" \
      "or v6e-N; for another type set --runtime=..." ;;
  esac
}

# --- running ------------------------------------------------------------------

# Prints words quoted for the shell.
quote() {
  local word out=()
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      out+=("$word")
    else
      out+=("'${word//\'/\'\\\'\'}'")
    fi
  done
  echo "${out[*]}"
}

run() {
  if $dry_run; then
    quote "$@"
  else
    "$@"
  fi
}

resource() {
  local verb=$1
  shift
  run gcloud compute tpus queued-resources "$verb" "$name" "$@" "${place[@]}"
}

# Runs command $1 on workers $2 (default all) of slices $3 (default all).
remote() {
  resource ssh "--node=${3:-all}" "--worker=${2:-all}" "--command=$1"
}

# Prints the state that a gcloud command reports, NONE if there is no such
# resource, or UNREACHABLE.
ask() {
  local answer errors
  errors=$(mktemp)
  if answer=$("$@" 2> "$errors"); then
    echo "${answer:-UNKNOWN}"
  elif grep -qE 'NOT_FOUND|was not found' "$errors"; then
    echo NONE
  else
    cat "$errors" >&2
    echo UNREACHABLE
  fi
  rm -f "$errors"
}

# Prints ACTIVE if all slices are ready, NONE if there is no such resource, else
# the state of the resource or of the first slice that is not READY.
state() {
  local found node i
  found=$(ask resource describe '--format=value(state.state)')
  if [[ $found = ACTIVE ]]; then
    for ((i = 0; i < slices; i++)); do
      node=$name
      ((slices == 1)) || node=$name-$i
      node=$(ask run gcloud compute tpus tpu-vm describe "$node" \
        '--format=value(state)' "${place[@]}")
      [[ $node = READY ]] || { found=$node && break; }
    done
  fi
  echo "$found"
}

# --- commands -----------------------------------------------------------------

create() {
  need name project zone accelerator
  choose_runtime
  local flags=("--accelerator-type=$accelerator" "--runtime-version=$runtime")
  if ((slices > 1)); then
    flags+=("--node-count=$slices" "--node-prefix=$name")
  else
    flags+=("--node-id=$name")
  fi
  case $capacity in
    spot | reserved) flags+=("--$capacity") ;;
    on-demand) ;;
    *) die "--capacity=$capacity: expected spot, reserved or on-demand" ;;
  esac
  resource create "${flags[@]}" ${create_flags[@]+"${create_flags[@]}"}
  wait_until_active
}

wait_until_active() {
  if $dry_run; then
    echo "# every $poll_secs s, until it prints ACTIVE:"
    resource describe '--format=value(state.state)'
    return
  fi
  local now='' before
  while [[ $now != ACTIVE ]]; do
    before=$now
    now=$(state)
    [[ $now = "$before" ]] || say "$name: $now"
    case $now in
      ACTIVE) ;;
      SUSPENDED | FAILED | PREEMPTED | TERMINATED | NONE)
        die "$name is $now; for the reason run: gcloud compute tpus" \
          "queued-resources describe $name ${place[*]}" ;;
      *) sleep "$poll_secs" ;;
    esac
  done
}

setup() {
  need name project zone
  local archive=${TMPDIR:-/tmp}/marlin_jax-$name.tar.gz
  # The TPU images' Python is too old; uv installs a newer one.
  # shellcheck disable=SC2016 # expanded by the worker
  local install='set -e
mkdir -p ~/marlin_jax/run && cd ~/marlin_jax
flock -n run/lock true || { echo "$(hostname): a training is running" >&2; exit 1; }
rm -rf marlin_jax data_prep configs && tar -xzf ../marlin_jax.tar.gz
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
uv="python3 -m uv"
$uv venv --quiet --allow-existing --python ">=3.11,<3.13" .venv
$uv pip install --quiet --python .venv/bin/python -e ".[train,tpu,gcs]"
.venv/bin/python -c "import jax, marlin_jax.train; print(jax.__version__)"'
  run tar -czf "$archive" --exclude=__pycache__ -C "$root" "${parts[@]}"
  run gcloud compute tpus queued-resources scp "$archive" \
    "$name:marlin_jax.tar.gz" --node=all --worker=all "${place[@]}"
  remote "$install"
}

launch() {
  need name project zone
  check_train_flags
  local train start
  train=$(quote .venv/bin/python -m marlin_jax.train "${train_flags[@]}" \
    --config.distributed.coordinator=auto)
  # The training holds run/lock, which it inherits from the shell below.
  start="$train >> run/train.log 2>&1 & echo \$! > run/pid
wait \$!; echo \$? > run/exit"
  remote "set -e; cd ~/marlin_jax; exec 9> run/lock
flock -n 9 || { echo \"\$(hostname): a training is running\" >&2; exit 1; }
rm -f run/pid run/exit run/stopped
nohup setsid bash -c $(quote "$start") < /dev/null > run/nohup.log 2>&1 &"
  $dry_run || say "$name: training; its log: tools/tpu_vm.sh logs --name=$name"
}

# Prints one line per worker: 'worker HOST: ', then running, stopped CODE, ended
# CODE, gone (the run or its machine was killed) or idle (never launched). A run
# writes its exit code before it releases the lock. Checking in the other order
# would report a run that ends in between as gone.
# shellcheck disable=SC2016 # expanded by the worker
report='cd ~/marlin_jax/run 2> /dev/null || { echo "worker $(hostname): idle"; exit 0; }
if ! flock -n lock true; then now=running
else
  code=$(cat exit 2> /dev/null || true)
  if [ -e stopped ]; then now="stopped $code"
  elif [ -n "$code" ]; then now="ended $code"
  elif [ -e pid ]; then now=gone
  else now=idle; fi
fi
echo "worker $(hostname): $now"'

status() {
  need name project zone
  local now=ACTIVE
  if $dry_run; then
    resource describe '--format=value(state.state)'
  else
    now=$(state)
    say "$name: $now"
  fi
  [[ $now != ACTIVE ]] || remote "$report; tail -n 1 train.log"
}

logs() {
  need name project zone
  local tail="tail -n 50 ~/marlin_jax/run/train.log"
  if $follow; then
    [[ $worker != all && $slice != all ]] ||
      die "--follow: needs one worker, set --worker=N and --slice=N"
    tail="tail -n 50 -f ~/marlin_jax/run/train.log"
  fi
  remote "$tail" "$worker" "$slice"
}

stop() {
  need name project zone
  # A training that hangs is killed after $stop_secs.
  remote "cd ~/marlin_jax/run || exit 0
flock -n lock true && { echo \"\$(hostname): no training is running\"; exit 0; }
until [ -s pid ]; do sleep 0.1; done
touch stopped && kill -TERM \$(cat pid)
flock -w $stop_secs lock true || kill -KILL \$(cat pid)
echo \"\$(hostname): ended with \$(cat exit)\""
}

restart() {
  need name project zone
  check_train_flags
  local now=ACTIVE
  $dry_run || now=$(state)
  case $now in
    ACTIVE) stop ;;
    SUSPENDED | FAILED | PREEMPTED | TERMINATED) delete && create ;;
    NONE) create ;;
    UNREACHABLE) die "the state of $name is unknown, see above" ;;
    *) wait_until_active ;;
  esac
  setup
  launch
}

delete() {
  need name project zone
  resource delete --force
}

# --- babysit ------------------------------------------------------------------

# Prints the state of all workers: running, stopped, finished (all exit codes 0),
# failed (one of them 1: refused), ended (none is running) or unknown: none could
# be asked, and file $1 has the reason.
outcome() {
  local states
  states=$(remote "$report" 2> "$1" |
    sed -nE 's/^worker [^ ]+: (running|idle|gone|(stopped|ended).*)$/\1/p' |
    sort -u)
  case $states in
    '') echo unknown ;;
    *running*) echo running ;;
    *stopped*) echo stopped ;;
    'ended 0') echo finished ;;
    *)
      if grep -qx 'ended 1' <<< "$states"; then echo failed; else echo ended; fi ;;
  esac
}

# Runs another command of this script and returns its exit code.
step() {
  say "$name: $1"
  bash "${BASH_SOURCE[0]}" "$1" ${settings[@]+"${settings[@]}"} \
    -- "${train_flags[@]}"
}

show_babysit() {
  echo "# every $poll_secs s:"
  resource describe '--format=value(state.state)'
  echo "# while it is ACTIVE, until all have ended with 0 or one with 1:"
  remote "$report"
  echo "# when it is SUSPENDED, FAILED or PREEMPTED:"
  delete
  echo "# then, and when there is no TPU yet:"
  create
  echo "# then, and when all workers have ended otherwise:"
  setup
  launch
}

babysit() {
  need name project zone accelerator
  check_train_flags
  choose_runtime
  if $dry_run; then
    show_babysit
    return
  fi
  local now silent=0 errors
  errors=$(mktemp)
  # shellcheck disable=SC2064 # the file is known now
  trap "rm -f '$errors'" EXIT
  while true; do
    now=$(state)
    if [[ $now = ACTIVE ]]; then
      now=$(outcome "$errors")
      # When a TPU is lost, its workers disappear first.
      [[ $now != ended || $(state) = ACTIVE ]] || now=leaving
    fi
    case $now in
      finished)
        say "$name: finished; to end the costs: tools/tpu_vm.sh delete"
        return ;;
      stopped)
        say "$name: stopped by 'stop'; 'restart' resumes it"
        return ;;
      failed)
        remote 'tail -n 30 ~/marlin_jax/run/train.log' all all || true
        die "$name: the training was refused, see the reason above. The TPU" \
          "still exists: correct the flags and 'restart', or 'delete'" ;;
      ended)
        count_failure "no worker was training"
        try setup launch ;;
      unknown)
        # One silence may pass: a preempted TPU loses its workers first.
        if ((++silent % 10 == 0)); then
          tail -n 5 "$errors" >&2
          count_failure "no worker could be reached $silent times in a row"
        fi ;;
      SUSPENDED | PREEMPTED | TERMINATED | FAILED)
        say "$name: $now"
        if step delete; then try create setup launch; fi ;;
      NONE) try create setup launch ;;
      *) ;; # running, or changing to another state
    esac
    [[ $now = unknown ]] || silent=0
    sleep "$poll_secs"
  done
}

# Runs commands until one fails.
try() {
  local each
  for each; do
    step "$each" || { count_failure "$each failed" && return; }
  done
}

failures=0
count_failure() {
  failures=$((failures + 1))
  ((failures <= max_restarts)) || die "$name: $1, failure $failures" \
    "(--max-restarts=$max_restarts); see: tools/tpu_vm.sh logs --worker=all"
  say "$name: $1, failure $failures of $max_restarts allowed"
}

command=${1:-help}
case $command in
  help | -h | --help) usage ;;
  create | setup | launch | status | logs | stop | restart | babysit | delete)
    shift
    parse "$@"
    check_numbers
    "$command"
    ;;
  *) die "unknown command '$command'; see: tools/tpu_vm.sh help" ;;
esac
