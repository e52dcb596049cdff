"""Waits until every process of a run has come, and names those that have not.

jax itself, when one is missing, ends the others with a stack trace that names
nobody. So before jax connects them, each tells process 0 that it is there, over
the very address and port that jax uses next: where this works, that will.
"""

from __future__ import annotations

import contextlib
import re
import socket
import time

from marlin_jax.records.cli import UserError

_HELLO = re.compile(rb"marlin_jax (\d+) of (\d+)\n")
_ALL_HERE = b"all here\n"
_PROBLEM = b"problem: "
# A line of the protocol is no longer.
_MAX_LINE = 2000
# For one that is connected to say who it is.
_HELLO_SECS = 2
_RETRY_SECS = 0.2


class StartError(UserError):
  """The processes could not be brought together."""


def meet(address: str, num: int, me: int, timeout_secs: float) -> None:
  """Returns when all processes have called it.

  Args:
    address: host:port of process 0.
    num: processes.
    me: number of this one, from 0.
    timeout_secs: how long to wait.

  Raises:
    StartError: not all came in time, or they disagree about each other.
  """
  if me == 0:
    _wait_for_all(address, num, timeout_secs)
  else:
    _report(address, num, me, timeout_secs)


def _advice(address: str) -> str:
  host, _, port = address.rpartition(":")
  return (
    "Check that each process was started, with this coordinator and "
    f"num_processes and a process_id of its own, that its machine reaches "
    f"{host}, and that no firewall closes port {port}; "
    "config.distributed.timeout_secs says how long to wait"
  )


# --- process 0 ----------------------------------------------------------------


def _wait_for_all(address: str, num: int, timeout_secs: float) -> None:
  deadline = time.monotonic() + timeout_secs
  here: dict[int, socket.socket] = {}
  problem = None
  with contextlib.ExitStack() as stack:
    server = stack.enter_context(_listen(address))
    while len(here) < num - 1 and not problem:
      server.settimeout(max(deadline - time.monotonic(), 0.001))
      try:
        peer = stack.enter_context(server.accept()[0])
      except TimeoutError:
        missing = [str(i) for i in range(1, num) if i not in here]
        problem = (
          f"after {timeout_secs:g} s {1 + len(here)} of {num} processes have "
          f"come to the coordinator at {address}; missing: "
          f"{', '.join(missing)}. {_advice(address)}"
        )
        break
      hello = _HELLO.fullmatch(_read(peer))
      if not hello:
        peer.close()  # a stranger
        continue
      one, says = map(int, hello.groups())
      if says != num or not 0 < one < num:
        problem = (
          f"a process came as number {one} of {says}, process 0 expects {num} "
          "processes, numbers 0 and up; start all with the same num_processes"
        )
      elif one in here and _is_there(here[one]):
        problem = (
          f"two processes came as number {one} of {num}; give each a "
          "process_id of its own"
        )
      else:
        here[one] = peer
        # One that has gone, crashed or killed, may come back.
        here = {i: other for i, other in here.items() if _is_there(other)}
        continue
      _send(peer, _PROBLEM + problem.encode() + b"\n")
    for peer in here.values():
      _send(peer, _PROBLEM + problem.encode() + b"\n" if problem else _ALL_HERE)
  if problem:
    raise StartError(problem)


def _listen(address: str) -> socket.socket:
  port = int(address.rpartition(":")[2])
  both = socket.has_dualstack_ipv6()
  try:
    return socket.create_server(
      ("", port),
      family=socket.AF_INET6 if both else socket.AF_INET,
      dualstack_ipv6=both,
    )
  except OSError as e:
    raise StartError(
      f"process 0 cannot listen on port {port} of the coordinator's address "
      f"{address}: {e.strerror}; choose another port, or end what uses it "
      "(an earlier run?)"
    ) from e


def _read(peer: socket.socket) -> bytes:
  peer.settimeout(_HELLO_SECS)
  try:
    return peer.recv(_MAX_LINE)
  except OSError:
    return b""


def _is_there(peer: socket.socket) -> bool:
  """Whether the other end, which has nothing more to say, is still open."""
  peer.setblocking(False)
  try:
    return peer.recv(1, socket.MSG_PEEK) != b""
  except BlockingIOError:
    return True
  except OSError:
    return False


def _send(peer: socket.socket, line: bytes) -> None:
  with contextlib.suppress(OSError):  # it has just gone: it need not know
    peer.settimeout(_HELLO_SECS)
    peer.sendall(line)


# --- the others ---------------------------------------------------------------


def _report(address: str, num: int, me: int, timeout_secs: float) -> None:
  deadline = time.monotonic() + timeout_secs
  host, _, port = address.rpartition(":")
  last = "no answer"
  while (left := deadline - time.monotonic()) > 0:
    try:
      with socket.create_connection((host.strip("[]"), port), left) as server:
        server.sendall(f"marlin_jax {me} of {num}\n".encode())
        # A little longer: process 0 knows best who is missing.
        server.settimeout(left + 2 * _HELLO_SECS)
        answer = server.makefile("rb").readline(_MAX_LINE)
    except OSError as e:
      last = e.strerror or str(e)
    else:
      if answer == _ALL_HERE:
        return
      if answer.startswith(_PROBLEM):
        text = answer.removeprefix(_PROBLEM).decode(errors="replace")
        raise StartError(text.strip())
      last = (
        f"something else answers there: {answer!r}" if answer else "it left"
      )
    time.sleep(_RETRY_SECS)
  raise StartError(
    f"process {me} of {num} waited {timeout_secs:g} s for process 0, the "
    f"coordinator at {address}: {last}. {_advice(address)}"
  )
