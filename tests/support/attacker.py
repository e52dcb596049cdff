"""A decoder that a hostile video has taken over, run in place of the decoder.

Its video is an order in JSON, read in the sandbox:
  {"messages": [["I", "{...}"], ...]}   sends these to the parent
  {"linger": true}                      ignores signals and never ends
  {"folder": ..., "port": ..., "parent": ...}
                                        tries what an attacker would, and sends
                                        the outcome of each attempt as a note
"--without=LAYER,..." leaves out layers of the sandbox.
"""

import ctypes
import encodings.idna  # noqa: F401, for addresses
import json
import os
import signal
import socket
import struct
import sys

from data_prep.decoder import process, protocol, sandbox

LIBC = ctypes.CDLL(None, use_errno=True)


def main() -> None:
  if sys.argv[1].startswith("--without="):
    leave_out(sys.argv.pop(1).partition("=")[2].split(","))
  process._decode = follow_order
  process.main()


def leave_out(layers: list[str]) -> None:
  reason = "left out"
  if "everything" in layers:
    sandbox.enter = lambda pipe: dict.fromkeys(sandbox.LAYERS, reason)
  if "seccomp" in layers:
    sandbox._seccomp = lambda libc: reason
  if "landlock" in layers:
    sandbox._landlock = lambda libc: (reason, reason)
  if "namespaces" in layers:
    sandbox._leave_the_system = lambda libc: dict.fromkeys(
      ("user", "namespaces", "empty_root"), reason
    )


def follow_order(
  limits: protocol.Limits,
  span: protocol.Span,
  may_change_size: bool,
  pipe: int,
) -> None:
  order = json.loads(os.read(0, 1 << 20))
  for kind, text in order.get("messages", []):
    protocol.send(pipe, kind.encode(), text.encode())
  if "messages" in order:
    return
  if order.get("linger"):
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
      signal.signal(number, signal.SIG_IGN)
    LIBC.prctl(1, 0, 0, 0, 0)
    protocol.send(pipe, b"X", b"lingers")
    while True:
      pass
  folder, port, parent = order["folder"], order["port"], order["parent"]
  tries = attempts(folder, port, parent)
  if order["has_bare_calls"]:
    tries |= bare_calls(folder, parent)
  texts = [text for pair in os.environ.items() for text in pair]
  secrets = sum("SECRET" in text for text in texts)
  protocol.send(pipe, b"I", order["header"].encode())
  protocol.send(pipe, b"W", f"environment={secrets}".encode())
  for name, attempt in tries.items():
    number = result_of(attempt, order["forks"])
    protocol.send(pipe, b"W", f"{name}={number}".encode())
  protocol.send(pipe, b"E")


def result_of(attempt, forks: bool) -> int:
  """Returns the number of the error that the attempt met, 0 if it succeeded.

  Args:
    attempt: a function.
    forks: try it in a child process, which it may end or replace.
  """
  if forks:
    if child := os.fork():
      return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(result_of(attempt, False))
  try:
    attempt()
  except OSError as e:
    return e.errno
  return 0


def attempts(folder: str, port: int, parent: int) -> dict:
  """Returns functions that raise OSError where they are refused."""
  secret = f"{folder}/secret"
  return {
    "read": lambda: os.open(secret, os.O_RDONLY),
    "list": lambda: os.listdir(folder),
    "parents_environment": lambda: os.open(
      f"/proc/{parent}/environ", os.O_RDONLY
    ),
    "write": lambda: os.open(secret, os.O_WRONLY),
    "truncate": lambda: os.truncate(f"{folder}/a", 0),
    "rename": lambda: os.rename(f"{folder}/b", f"{folder}/b2"),
    "unlink": lambda: os.unlink(f"{folder}/c"),
    "symlink": lambda: os.symlink("/etc/passwd", f"{folder}/link"),
    "mkdir": lambda: os.mkdir(f"{folder}/made"),
    "connect": lambda: socket.create_connection(("127.0.0.1", port)),
    "fork": lambda: os.fork() or os._exit(0),
    "exec": lambda: os.execv("/bin/sh", ["/bin/sh", "-c", "exit 0"]),
    "kill": lambda: os.kill(parent, 0),
  }


def bare_calls(folder: str, parent: int) -> dict:
  """Returns system calls of x86_64, which no C library stands before."""
  path = f"{folder}/secret".encode()
  address = struct.pack("=HH4sxxxxxxxx", 2, 80, bytes((127, 0, 0, 1)))
  here = -100
  calls = {
    "open": (2, path, 0),
    "openat": (257, here, path, 0),
    "openat2": (437, here, path, bytes(24), 24),
    "creat": (85, path, 0o600),
    "socket": (41, 2, 1, 0),
    "connect": (42, 0, address, len(address)),
    "sendto": (44, 0, b"x", 1, 0, address, len(address)),
    "execve": (59, b"/bin/sh", None, None),
    "execveat": (322, here, b"/bin/sh", None, None, 0),
    "fork": (57,),
    "vfork": (58,),
    "clone": (56, 17, 0, 0, 0, 0),
    "clone3": (435, bytes(88), 88),
    "ptrace": (101, 16, parent, 0, 0),
    "process_vm_writev": (311, parent, 0, 0, 0, 0, 0),
    "pidfd_open": (434, parent, 0),
    "kill": (62, parent, 0),
    "tkill": (200, parent, 0),
    "tgkill": (234, parent, parent, 0),
    "rt_sigqueueinfo": (129, parent, 0, bytes(128)),
    "setsid": (112,),
    "unlinkat": (263, here, path, 0),
    "renameat2": (316, here, path, here, b"x", 0),
    "linkat": (265, here, path, here, b"x", 0),
    "ftruncate": (77, 1, 0),
    "fchmod": (91, 0, 0o777),
    "chroot": (161, b"/"),
    "mount": (165, None, None, None, 0, None),
    "unshare": (272, 0x10000000),
    "setns": (308, 0, 0),
    "setresuid": (117, 0, 0, 0),
    "capset": (126, None, None),
    "io_uring_setup": (425, 1, bytes(120)),
    "bpf": (321, 0, bytes(48), 48),
    "memfd_create": (319, b"x", 0),
    "shmget": (29, 0, 4096, 0o1600),
    "ioctl": (16, 0, 0x5401, bytes(64)),
    "fcntl_setown": (72, 0, 8, parent),
    "prlimit_of_parent": (302, parent, 7, None, bytes(16)),
    "prctl_pdeathsig": (157, 1, 0, 0, 0, 0),
    "prctl_dumpable": (157, 4, 1, 0, 0, 0),
  }

  def make(number: int, *arguments) -> None:
    arguments = [ctypes.c_long(a) if type(a) is int else a for a in arguments]
    if LIBC.syscall(ctypes.c_long(number), *arguments) < 0:
      raise OSError(ctypes.get_errno(), "refused")

  return {
    f"call_{name}": lambda call=call: make(*call)
    for name, call in calls.items()
  }


if __name__ == "__main__":
  main()
