"""Takes all rights from a process that decoding a video does not need.

A decoder is a large C program that reads hostile bytes, and a fault in it may
let a video run code. `enter` leaves such code nothing to reach. It is called
once, when all libraries are loaded, in a process of one thread:

  layers = sandbox.enter(pipe)   # continues in a child process

The layers:

  limits            few open files here; memory, CPU time and file size are set
                    by the caller, and the number of processes by
                    `forbid_threads`
  user              root becomes the user nobody
  namespaces        own network, process, IPC and host name namespaces: no
                    network, no other process in sight, and the kernel ends all
                    descendants together with the process
  empty_root        the root folder is one without files
  no_new_privs      executing a file gives no rights
  landlock          no path of the file system
  landlock_network  no TCP port
  seccomp           only the system calls of `_CALLS`: none opens, connects,
                    executes, forks, signals, removes or renames

They need Linux and no rights. A layer that this kernel lacks, or that a
container forbids, is reported with the reason, and the others still hold.
Sources: namespaces(7), landlock(7), seccomp(2), prctl(2), bpf(4).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys

LAYERS = (
  "limits",
  "user",
  "namespaces",
  "empty_root",
  "no_new_privs",
  "landlock",
  "landlock_network",
  "seccomp",
)
MAX_FILES = 16
_NOBODY = 65534

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_NAME = 15
_PR_SET_SECCOMP = 22
_PR_SET_NO_NEW_PRIVS = 38
_PR_SET_VMA = 0x53564D41

_CLONE_NEWUSER = 0x10000000
_CLONE_NEWPID = 0x20000000
_CLONE_NEWNET = 0x40000000
_CLONE_NEWIPC = 0x08000000
_CLONE_NEWUTS = 0x04000000
_CLONE_THREAD = 0x00010000


def enter(pipe: int) -> dict[str, str]:
  """Continues in a child process without rights; this one waits for it.

  Open files stay open, and are the only way out of the child. The waiting
  process ends as the child does. SIGTERM makes it kill the child.

  Args:
    pipe: file descriptor that the waiting process closes, so that its reader
      sees when the child ends. Standard input is closed likewise.

  Returns:
    For each of `LAYERS` an empty string where it holds, else why it does not.
  """
  if sys.platform != "linux":
    return dict.fromkeys(LAYERS, f"needs Linux, this is {sys.platform}")
  libc = _c_library()
  parent = os.getppid()
  layers = _leave_the_system(libc)
  # A change of user takes it back. SIGTERM, so that no child is left over.
  end_with_parent(signal.SIGTERM)
  if os.getppid() != parent:
    os._exit(1)
  _continue_in_child(libc, pipe)
  end_with_parent()
  libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
  layers["no_new_privs"] = _reason(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
  resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_FILES, MAX_FILES))
  layers["limits"] = ""
  layers["landlock"], layers["landlock_network"] = _landlock(libc)
  layers["seccomp"] = _seccomp(libc)
  return {layer: layers[layer] for layer in LAYERS}


def end_with_parent(number: int = signal.SIGKILL) -> None:
  """Makes the kernel signal this process when its parent ends.

  To the kernel, the parent is the thread that started this process.
  """
  if sys.platform == "linux":
    _c_library().prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def forbid_threads() -> None:
  """Sets RLIMIT_NPROC to 0: no thread can be added to those that run.

  The kernel exempts root; seccomp forbids processes, but not threads.
  """
  resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def _c_library() -> ctypes.CDLL:
  libc = ctypes.CDLL(None, use_errno=True)
  libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)
  libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
  return libc


def _reason(result: int) -> str:
  """Returns why a call of the C library failed, or ''."""
  return os.strerror(ctypes.get_errno()) if result < 0 else ""


# --- Processes ----------------------------------------------------------------


def _leave_the_system(libc: ctypes.CDLL) -> dict[str, str]:
  """Enters namespaces, for children, and an empty root; leaves user root."""
  spaces = _CLONE_NEWPID | _CLONE_NEWNET | _CLONE_NEWIPC | _CLONE_NEWUTS
  layers = {"user": "", "namespaces": "not root", "empty_root": "not root"}
  if os.geteuid() == 0:
    layers["namespaces"] = _reason(libc.unshare(spaces))
    layers["empty_root"] = _enter_empty_root()
    layers["user"] = (
      _reason(libc.setgroups(0, None))
      or _reason(libc.setresgid(_NOBODY, _NOBODY, _NOBODY))
      or _reason(libc.setresuid(_NOBODY, _NOBODY, _NOBODY))
    )
  # In a user namespace of its own, a process without rights may do the same.
  if layers["namespaces"]:
    layers["namespaces"] = _reason(libc.unshare(_CLONE_NEWUSER | spaces))
  if layers["empty_root"]:
    layers["empty_root"] = _enter_empty_root()
  return layers


def _enter_empty_root() -> str:
  """Makes a folder of this process in /proc the root; returns why not, or ''.

  It names the open files, which are not those of the child, and opens none.
  """
  try:
    os.chroot("/proc/self/fdinfo")
    os.chdir("/")
  except OSError as e:
    return e.strerror or str(e)
  return ""


def _continue_in_child(libc: ctypes.CDLL, pipe: int) -> None:
  """Returns in a new child process; this one ends as the child has ended."""
  child = 0

  def kill(*_) -> None:
    os.kill(child, signal.SIGKILL)

  # Blocked until the number of the child is known.
  signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
  signal.signal(signal.SIGTERM, kill)
  child = os.fork()
  if not child:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    # The kernel discards signals to process 1 of a namespace that have no
    # handler. A function in Python would wait for C code to return.
    libc.signal(signal.SIGXCPU, ctypes.cast(libc._exit, ctypes.c_void_p))
    return
  os.close(0)
  os.close(pipe)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
  ended = {}
  with contextlib.suppress(ChildProcessError):
    while True:  # the caller may have started another child
      pid, status = os.wait()
      ended[pid] = os.waitstatus_to_exitcode(status)
  code = ended[child]
  if code == signal.SIGXCPU:
    code = -code
  if code >= 0:
    os._exit(code)
  with contextlib.suppress(OSError):  # SIGKILL has no handler
    signal.signal(-code, signal.SIG_DFL)
  os.kill(os.getpid(), -code)
  os._exit(1)


# --- Landlock -----------------------------------------------------------------

# The numbers of these calls are the same on all machine types.
_LANDLOCK_CREATE_RULESET = 444
_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_CREATE_RULESET_VERSION = 1
# Number of rights over files in versions 1 to 5, a bit each.
_NUM_FILE_RIGHTS = (13, 14, 15, 15, 16)
_TCP_VERSION, _TCP_RIGHTS = 4, 0b11
# No signal to processes outside, no abstract Unix socket.
_SCOPE_VERSION, _SCOPES = 6, 0b11


def _landlock(libc: ctypes.CDLL) -> tuple[str, str]:
  """Gives up all paths and TCP ports; returns why not, or '', for each."""
  version = libc.syscall(
    ctypes.c_long(_LANDLOCK_CREATE_RULESET),
    None,
    ctypes.c_size_t(0),
    ctypes.c_uint32(_LANDLOCK_CREATE_RULESET_VERSION),
  )
  if version < 1:
    reason = _reason(-1)
    return reason, reason
  num_rights = _NUM_FILE_RIGHTS[min(version, len(_NUM_FILE_RIGHTS)) - 1]
  rules = struct.pack("=Q", (1 << num_rights) - 1)
  if version >= _TCP_VERSION:
    rules += struct.pack("=Q", _TCP_RIGHTS)
  if version >= _SCOPE_VERSION:
    rules += struct.pack("=Q", _SCOPES)
  ruleset = libc.syscall(
    ctypes.c_long(_LANDLOCK_CREATE_RULESET),
    rules,
    ctypes.c_size_t(len(rules)),
    ctypes.c_uint32(0),
  )
  reason = _reason(ruleset)
  if not reason:
    reason = _reason(
      libc.syscall(
        ctypes.c_long(_LANDLOCK_RESTRICT_SELF), ruleset, ctypes.c_uint32(0)
      )
    )
    os.close(ruleset)
  no_tcp = f"landlock {version} of this kernel knows no TCP"
  return reason, reason or ("" if version >= _TCP_VERSION else no_tcp)


# --- Seccomp ------------------------------------------------------------------

_SECCOMP_MODE_FILTER = 2
_ALLOW = 0x7FFF0000
_KILL = 0x80000000
_ERRNO = 0x00050000
# Instructions of the kernel's packet filter.
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 6
_INSTRUCTION = struct.Struct("=HBBI")
# Offsets in what a filter sees: call number, machine type, first argument.
_NUMBER, _MACHINE, _ARGUMENTS = 0, 4, 16
_FIRST_X32_CALL = 0x40000000

# Machine type, and the column of `_CALLS`.
_MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
# Calls that decoding, threads and Python make with files that are open, by
# number on x86_64 and aarch64; frequent ones first. From asm/unistd.h.
_CALLS = {
  "read": (0, 63),
  "write": (1, 64),
  "lseek": (8, 62),
  "futex": (202, 98),
  "madvise": (28, 233),
  "mmap": (9, 222),
  "munmap": (11, 215),
  "mremap": (25, 216),
  "mprotect": (10, 226),
  "brk": (12, 214),
  "readv": (19, 65),
  "writev": (20, 66),
  "pread64": (17, 67),
  "close": (3, 57),
  "dup": (32, 23),
  "dup3": (292, 24),
  "fstat": (5, 80),
  "poll": (7, None),
  "ppoll": (271, 73),
  "select": (23, None),
  "pselect6": (270, 72),
  "clock_gettime": (228, 113),
  "clock_getres": (229, 114),
  "clock_nanosleep": (230, 115),
  "nanosleep": (35, 101),
  "gettimeofday": (96, 169),
  "time": (201, None),
  "times": (100, 153),
  "getrusage": (98, 165),
  "getrandom": (318, 278),
  "rt_sigaction": (13, 134),
  "rt_sigprocmask": (14, 135),
  "rt_sigreturn": (15, 139),
  "sigaltstack": (131, 132),
  "set_robust_list": (273, 99),
  "rseq": (334, 293),
  "membarrier": (324, 283),
  "sched_getaffinity": (204, 123),
  "sched_yield": (24, 124),
  "getcpu": (309, 168),
  "gettid": (186, 178),
  "getpid": (39, 172),
  "getppid": (110, 173),
  "getuid": (102, 174),
  "geteuid": (107, 175),
  "getgid": (104, 176),
  "getegid": (108, 177),
  "sysinfo": (99, 179),
  "uname": (63, 160),
  "getrlimit": (97, 163),
  "restart_syscall": (219, 128),
  "exit": (60, 93),
  "exit_group": (231, 94),
}
# Calls that are allowed for some arguments.
_CLONE = (56, 220)
_CLONE3 = 435
_TGKILL = (234, 131)
_PRCTL = (157, 167)
_PRLIMIT64 = (302, 261)
_FCNTL = (72, 25)
_FSTATAT = (262, 79)
_AT_EMPTY_PATH = 0x1000
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL and F_DUPFD_CLOEXEC: F_SETOWN
# would make the kernel signal any process.
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)


def _seccomp(libc: ctypes.CDLL) -> str:
  """Gives up all system calls that are not needed; returns why not, or ''."""
  machine = platform.machine()
  if machine not in _MACHINES:
    return f"the calls of {machine} are not known here"
  code = b"".join(_filter(*_MACHINES[machine]))
  buffer = ctypes.create_string_buffer(code, len(code))
  program = ctypes.create_string_buffer(
    struct.pack("@HP", len(code) // _INSTRUCTION.size, ctypes.addressof(buffer))
  )
  address = ctypes.addressof(program)
  return _reason(
    libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, address, 0, 0)
  )


def _instruction(
  code: int, value: int, if_true: int = 0, if_false: int = 0
) -> bytes:
  """Returns an instruction; a test skips `if_true` or `if_false` others."""
  return _INSTRUCTION.pack(code, if_true, if_false, value)


def _filter(machine: int, column: int) -> list[bytes]:
  """Returns the instructions of the filter."""
  allow = _instruction(_RETURN, _ALLOW)
  refuse = _instruction(_RETURN, _ERRNO | errno.EPERM)
  kill = _instruction(_RETURN, _KILL)
  program = [
    _instruction(_LOAD, _MACHINE),
    _instruction(_IF_EQUAL, machine, if_true=1),
    kill,
    _instruction(_LOAD, _NUMBER),
    # On x86_64, a second table of calls begins here.
    _instruction(_IF_AT_LEAST, _FIRST_X32_CALL, if_false=1),
    kill,
  ]
  for numbers in _CALLS.values():
    if numbers[column] is not None:
      program += [
        _instruction(_IF_EQUAL, numbers[column], if_false=1),
        allow,
      ]
  for numbers, argument, test, values in (
    (_CLONE, 0, _IF_ANY_BIT, (_CLONE_THREAD,)),
    (_TGKILL, 0, _IF_EQUAL, (os.getpid(),)),
    (_PRCTL, 0, _IF_EQUAL, (_PR_SET_NAME, _PR_SET_VMA)),
    (_PRLIMIT64, 0, _IF_EQUAL, (0,)),
    (_FCNTL, 1, _IF_EQUAL, _FCNTL_COMMANDS),
    # The C library's fstat.
    (_FSTATAT, 3, _IF_EQUAL, (_AT_EMPTY_PATH,)),
  ):
    block = [_instruction(_LOAD, _ARGUMENTS + 8 * argument)]
    for value in values:
      block += [_instruction(test, value, if_false=1), allow]
    block.append(refuse)
    program.append(
      _instruction(_IF_EQUAL, numbers[column], if_false=len(block))
    )
    program += block
  # The C library then falls back to clone, whose arguments a filter sees.
  program += [
    _instruction(_IF_EQUAL, _CLONE3, if_false=1),
    _instruction(_RETURN, _ERRNO | errno.ENOSYS),
    refuse,
  ]
  return program
