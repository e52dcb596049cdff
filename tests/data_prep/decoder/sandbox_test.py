"""Code that runs in a decoder reaches nothing: tried in that very process."""

import errno
import json
import os
import platform
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data_prep.decoder import child, sandbox
from data_prep.video import decode
from data_prep.video.decode import (
  DecodeError,
  DecoderSetupError,
  Limits,
  open_video,
)
from tests.support import attacker
from tests.support.processes import ROOT
from tests.support.videos import moving_noise, write_video

pytestmark = pytest.mark.skipif(
  sys.platform != "linux", reason="the sandbox is one of Linux"
)
# Refusals by the filter of system calls; by landlock, the empty root and the
# empty network also others.
FILTERED = {errno.EPERM, errno.ENOSYS}
REFUSED = FILTERED | {errno.EACCES, errno.ENOENT, errno.ESRCH}
REFUSED |= {errno.ENETUNREACH, errno.ECONNREFUSED, errno.EHOSTUNREACH}
HEADER = {
  "width": 64,
  "height": 48,
  "orientation": [1, 0, 0, 1],
  "rate": 30.0,
  "announced_frames": 1,
}
HAS_BARE_CALLS = platform.machine() == "x86_64"


@pytest.fixture
def taken_over(tmp_path, monkeypatch):
  """A function that opens a "video" that is an order to the attacker."""

  def open_order(order: dict, without: str = "", **limits) -> decode.Video:
    options = [f"--without={without}"] if without else []
    program = ("-P", attacker.__file__, *options)
    monkeypatch.setattr(child, "PROGRAM", program)
    path = tmp_path / "order"
    path.write_text(json.dumps(order))
    return open_video(path, Limits(**limits))

  return open_order


@pytest.fixture
def attacked(tmp_path, monkeypatch, taken_over):
  """A function that attacks, and returns the error of each attempt."""
  monkeypatch.setenv("CLOUD_KEY", "SECRET")
  folder = tmp_path / "folder"
  folder.mkdir(mode=0o777)
  for name in ("secret", "a", "b", "c"):
    (folder / name).write_text("content")
    (folder / name).chmod(0o666)

  def attack(without: str = "", forks: bool = False) -> dict[str, int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
      order = {"folder": str(folder), "port": server.getsockname()[1]}
      order |= {"parent": os.getpid(), "forks": forks}
      order |= {"has_bare_calls": HAS_BARE_CALLS and not without}
      order |= {"header": json.dumps(HEADER)}
      monkeypatch.setattr(child, "MAX_NOTES", 100)
      with taken_over(order, without) as video:
        assert list(video) == []
    pairs = [note.split("=") for note in video.notes]
    return {name: int(number) for name, number in pairs}

  yield attack
  for name in ("secret", "a", "b", "c"):
    if (folder / name).exists():
      assert (folder / name).stat().st_size <= len("content")


def layers_here() -> dict[str, str]:
  return decode.sandbox_layers()


def test_all_layers_hold_on_this_kernel_or_say_why_not():
  layers = layers_here()
  assert tuple(layers) == sandbox.LAYERS
  summary = decode.sandbox_summary(layers)
  for name, reason in layers.items():
    assert name in summary
    assert reason in summary
  missing = {name: reason for name, reason in layers.items() if reason}
  if missing:
    pytest.skip(f"this kernel lacks layers: {missing}")


def test_attempts_succeed_without_a_sandbox(attacked):
  """Otherwise, that they fail in it would mean nothing."""
  results = attacked(without="everything", forks=True)
  assert results.pop("environment") == 0
  assert results.pop("write") in (0, errno.EPERM)
  assert {name: number for name, number in results.items() if number} == {}


def test_every_attempt_is_refused(attacked, tmp_path):
  layers = layers_here()
  if layers["seccomp"]:
    pytest.skip(f"no seccomp: {layers['seccomp']}")
  results = attacked()
  assert results.pop("environment") == 0
  assert len(results) > 40 or not HAS_BARE_CALLS
  assert {k: v for k, v in results.items() if v not in FILTERED} == {}
  files = sorted(path.name for path in (tmp_path / "folder").iterdir())
  assert files == ["a", "b", "c", "secret"]
  assert (tmp_path / "folder" / "a").read_text() == "content"


@pytest.mark.parametrize("without", ["seccomp", "namespaces,landlock"])
def test_layers_hold_without_each_other(attacked, tmp_path, without):
  layers = layers_here()
  if any(layers.values()):
    pytest.skip(f"this kernel lacks layers: {layers}")
  results = attacked(without)
  # Only the filter forbids new processes; they reach no more than this one.
  if without == "seccomp":
    assert results.pop("fork") == 0
  assert results.pop("environment") == 0
  assert {k: v for k, v in results.items() if v not in REFUSED} == {}
  assert (tmp_path / "folder" / "a").read_text() == "content"


def processes_with(text: str) -> list[int]:
  """Returns the processes whose command line holds a text."""
  numbers = []
  for path in Path("/proc").glob("[0-9]*/cmdline"):
    try:
      if text.encode() in path.read_bytes():
        numbers.append(int(path.parent.name))
    except OSError:
      continue
  return [number for number in numbers if number != os.getpid()]


def assert_gone(text: str) -> None:
  for _ in range(200):
    if not processes_with(text):
      return
    time.sleep(0.05)
  alive = processes_with(text)
  for number in alive:
    os.kill(number, signal.SIGKILL)
  pytest.fail(f"{len(alive)} processes live on")


@pytest.mark.parametrize("without", ["", "namespaces", "seccomp"])
def test_decoder_that_ignores_signals_ends_with_its_reader(tmp_path, without):
  path = tmp_path / "order"
  path.write_text('{"linger": true}')
  secs = 250.0 + len(without) / 8 + time.time() % 1 / 16
  code = (
    "import sys, time\n"
    "from data_prep.decoder import child\n"
    "from data_prep.video import decode\n"
    "from tests.support import attacker\n"
    "child.PROGRAM = ('-P', attacker.__file__, *sys.argv[3:])\n"
    "decode.Video.close = lambda self: None\n"
    "try:\n"
    "  decode.open_video(sys.argv[1], decode.Limits(secs=float(sys.argv[2])))\n"
    "except decode.DecodeError as e:\n"
    "  print(e, flush=True)\n"
    "time.sleep(60)\n"
  )
  options = [f"--without={without}"] if without else []
  with subprocess.Popen(
    [sys.executable, "-c", code, path, str(secs), *options],
    stdout=subprocess.PIPE,
    text=True,
    cwd=ROOT,
  ) as reader:
    assert reader.stdout.readline() == "lingers\n"
    assert len(processes_with(f'"secs": {secs}')) == 2
    reader.kill()
  assert_gone(f'"secs": {secs}')


def test_decoder_that_ignores_signals_is_ended_by_closing(taken_over):
  secs = 270.0 + time.time() % 1 / 16
  with pytest.raises(DecodeError, match="lingers"):
    taken_over({"linger": True}, secs=secs)
  assert not processes_with(f'"secs": {secs}')


def test_decoder_outlives_the_thread_that_opened_it(tmp_path):
  path = write_video(tmp_path / "v.mp4", moving_noise(30, 320, 240))
  videos = []
  thread = threading.Thread(target=lambda: videos.append(open_video(path)))
  thread.start()
  thread.join()
  with videos[0] as video:
    time.sleep(0.2)
    assert sum(1 for _ in video) == 30


def test_decoder_starts_while_python_is_ending(tmp_path):
  path = write_video(tmp_path / "v.mp4", moving_noise(3))
  code = (
    "import sys, threading\n"
    "from data_prep.video.decode import open_video\n"
    "def read():\n"
    "  threading.main_thread().join()\n"
    "  with open_video(sys.argv[1]) as video:\n"
    "    print(len(list(video)), flush=True)\n"
    "threading.Thread(target=read).start()\n"
  )
  result = subprocess.run(
    [sys.executable, "-c", code, path],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=True,
  )
  assert result.stdout == "3\n"


# JAX warns of forks, if an earlier test has started it.
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")
def test_decoder_starts_in_a_forked_process(tmp_path):
  path = write_video(tmp_path / "v.mp4", moving_noise(3))
  with open_video(path) as video:
    assert len(list(video)) == 3
  pid = os.fork()
  if not pid:
    with open_video(path) as video:
      os._exit(len(list(video)))
  assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3


# --- What the parent believes -------------------------------------------------


@pytest.mark.parametrize(
  "change",
  [
    {"width": 20_000, "height": 16_000},
    {"width": 1 << 40},
    {"height": -48},
    {"height": 0},
    {"width": "64"},
    {"width": True},
    {"rate": float("nan")},
    {"rate": -1.0},
    {"announced_frames": -1},
    {"announced_frames": None},
    {"orientation": [1, 1, 1, 1]},
    {"orientation": [2, 0, 0, 2]},
    {"orientation": None},
  ],
)
def test_header_that_breaks_the_protocol_is_refused(taken_over, change):
  with pytest.raises(DecodeError, match="no header|over the limit"):
    taken_over({"messages": [["I", json.dumps(HEADER | change)]]})


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 990, "7" * 990])
def test_header_that_is_no_object_is_refused(taken_over, text):
  with pytest.raises(DecodeError, match="no header"):
    taken_over({"messages": [["I", text]]})


def test_frame_of_another_size_is_refused(taken_over):
  messages = [["I", json.dumps(HEADER)], ["F", "x" * 100_000]]
  with (
    taken_over({"messages": messages}) as video,
    pytest.raises(DecodeError, match="not 64x48"),
  ):
    list(video)


def test_text_of_the_decoder_does_not_control_a_terminal(taken_over):
  messages = [["W", "a\x1b[2Jb\u202e"]] * 50 + [["X", "bad \x1b]0;x\x07 ü"]]
  with pytest.raises(DecodeError) as refusal:
    taken_over({"messages": messages})
  assert str(refusal.value) == "bad \\x1b]0;x\\x07 ü"


def test_notes_are_few(taken_over):
  messages = [["I", json.dumps(HEADER)]] + [["W", "\x1b"]] * 50 + [["E", ""]]
  with taken_over({"messages": messages}) as video:
    assert list(video) == []
    assert video.notes == ["\\x1b"] * child.MAX_NOTES


# --- Insisting ----------------------------------------------------------------


def test_missing_layer_is_told_and_refused_where_it_is_required(
  tmp_path, monkeypatch
):
  path = write_video(tmp_path / "v.mp4", moving_noise(3))
  program = ("-P", attacker.__file__, "--without=seccomp")
  monkeypatch.setattr(child, "PROGRAM", program)
  assert layers_here()["seccomp"] == "left out"
  assert "missing: seccomp (left out)" in decode.sandbox_summary(layers_here())
  with pytest.raises(DecoderSetupError, match=r"seccomp \(left out\)"):
    open_video(path, require_sandbox=True)
  with pytest.raises(DecoderSetupError, match="not whole"):
    decode.read_sound(path, require_sandbox=True)


# --- The filter on machines that are not here ---------------------------------

KILL, ALLOW, REFUSE, ABSENT = "kill", "allow", "refuse", "absent"


def verdict(machine: str, seen: int, number: int, *arguments: int) -> str:
  """Runs the filter of system calls as the kernel does.

  Args:
    machine: its filter.
    seen: machine type that makes the call.
    number: of the call.
    *arguments: of the call.
  """
  program = sandbox._filter(*sandbox._MACHINES[machine])
  values = {0: number, 4: seen}
  values |= {16 + 8 * i: value for i, value in enumerate(arguments)}
  at = loaded = 0
  while True:
    code, if_true, if_false, value = struct.unpack("=HBBI", program[at])
    at += 1
    if code == sandbox._LOAD:
      loaded = values.get(value, 0)
    elif code == sandbox._RETURN:
      return {
        0x7FFF0000: ALLOW,
        0x80000000: KILL,
        0x50000 | errno.EPERM: REFUSE,
        0x50000 | errno.ENOSYS: ABSENT,
      }[value]
    else:
      is_true = {
        sandbox._IF_EQUAL: loaded == value,
        sandbox._IF_AT_LEAST: loaded >= value,
        sandbox._IF_ANY_BIT: loaded & value != 0,
      }[code]
      at += if_true if is_true else if_false


ARM = {
  "openat": 56, "unlinkat": 35, "renameat2": 276, "socket": 198, "connect": 203,
  "execve": 221, "kill": 129, "tkill": 130, "ptrace": 117, "setsid": 157,
  "unshare": 97, "mount": 40, "ioctl": 29, "ftruncate": 46, "fchmod": 52,
  "bpf": 280, "io_uring_setup": 425, "memfd_create": 279, "setresuid": 147,
}  # fmt: skip


def test_filter_of_arm_refuses_what_that_of_intel_refuses():
  machine, _ = sandbox._MACHINES["aarch64"]

  def of(*call: int) -> str:
    return verdict("aarch64", machine, *call)

  for name, number in ARM.items():
    assert of(number) == REFUSE, name
  for number in (63, 64, 62, 98, 222, 93):  # read, write, lseek, futex, mmap
    assert of(number) == ALLOW
  assert of(220, 17) == REFUSE
  assert of(220, 0x10000) == ALLOW
  assert of(435) == ABSENT
  assert of(131, os.getpid()) == ALLOW
  assert of(131, os.getpid() + 1) == REFUSE
  assert of(25, 0, 8) == REFUSE


def test_calls_of_another_machine_type_end_the_process():
  intel, arm = (sandbox._MACHINES[name][0] for name in ("x86_64", "aarch64"))
  assert verdict("x86_64", intel, 0) == ALLOW
  # 32-bit calls, x32 calls, and those of the other processor.
  assert verdict("x86_64", 0x40000003, 5) == KILL
  assert verdict("x86_64", intel, 2 | 0x40000000) == KILL
  assert verdict("x86_64", arm, 63) == KILL
  assert verdict("aarch64", intel, 0) == KILL
