"""Waits until every process of a run has started, or names the missing ones.

jax.distributed.initialize (jax 0.10.2) does not: when a process is missing, it
aborts the others with SIGABRT and "DEADLINE_EXCEEDED", and it accepts a process
that was started with another num_processes. So before jax connects them, each
process reports to process 0 over the address and port that jax uses next.
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
# Longest line of the protocol, in bytes.
_MAX_LINE = 2000
# Time for a connected process to send its number.
_HELLO_SECS = 2
_RETRY_SECS = 0.2


class StartError(UserError):
  """Processes of a run that could not start together."""


def meet(
  address: str, num_processes: int, process_id: int, timeout_secs: float
) -> None:
  """Returns when all processes have called it.

  Args:
    address: host:port of process 0.
    num_processes: processes of the run.
    process_id: number of this process, from 0.
    timeout_secs: seconds to wait.

  Raises:
    StartError: not all processes came in time, or they disagree about their
      numbers. Names the missing processes.
  """
  if process_id == 0:
    _wait_for_all(address, num_processes, timeout_secs)
  else:
    _report(address, num_processes, process_id, timeout_secs)


def _advice(address: str) -> str:
  host, _, port = address.rpartition(":")
  return (
    "Check that each process was started, with this coordinator and "
    f"num_processes and a process_id of its own, that its machine reaches "
    f"{host}, and that no firewall closes port {port}; "
    "config.distributed.timeout_secs says how long to wait"
  )


# --- process 0 ----------------------------------------------------------------


def _wait_for_all(
  address: str, num_processes: int, timeout_secs: float
) -> None:
  deadline = time.monotonic() + timeout_secs
  present: dict[int, socket.socket] = {}
  problem = None
  with contextlib.ExitStack() as stack:
    server = stack.enter_context(_listen(address))
    while len(present) < num_processes - 1 and not problem:
      server.settimeout(max(deadline - time.monotonic(), 0.001))
      try:
        peer = stack.enter_context(server.accept()[0])
      except TimeoutError:
        missing = [str(i) for i in range(1, num_processes) if i not in present]
        problem = (
          f"after {timeout_secs:g} s {1 + len(present)} of {num_processes} "
          f"processes have reached the coordinator at {address}; missing: "
          f"{', '.join(missing)}. {_advice(address)}"
        )
        break
      hello = _HELLO.fullmatch(_read(peer))
      if not hello:
        peer.close()  # not a process of a run
        continue
      number, total = map(int, hello.groups())
      if total != num_processes or not 0 < number < num_processes:
        problem = (
          f"a process came as number {number} of {total}, process 0 expects "
          f"{num_processes} processes, numbers 0 and up; start all with the "
          "same num_processes"
        )
      elif number in present and _is_open(present[number]):
        problem = (
          f"two processes came as number {number} of {num_processes}; give "
          "each a process_id of its own"
        )
      else:
        present[number] = peer
        # A process that crashed or was killed may come back.
        present = {i: p for i, p in present.items() if _is_open(p)}
        continue
      _send(peer, _PROBLEM + problem.encode() + b"\n")
    for peer in present.values():
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


def _is_open(peer: socket.socket) -> bool:
  """Returns True while the peer, which sends nothing more, is connected."""
  peer.setblocking(False)
  try:
    return peer.recv(1, socket.MSG_PEEK) != b""
  except BlockingIOError:
    return True
  except OSError:
    return False


def _send(peer: socket.socket, line: bytes) -> None:
  with contextlib.suppress(OSError):  # the peer has just gone
    peer.settimeout(_HELLO_SECS)
    peer.sendall(line)


# --- other processes ----------------------------------------------------------


def _report(
  address: str, num_processes: int, process_id: int, timeout_secs: float
) -> None:
  deadline = time.monotonic() + timeout_secs
  host, _, port = address.rpartition(":")
  last = "no answer"
  while (left := deadline - time.monotonic()) > 0:
    try:
      with socket.create_connection((host.strip("[]"), port), left) as server:
        server.sendall(f"marlin_jax {process_id} of {num_processes}\n".encode())
        # A little longer than process 0, which names the missing processes.
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
        f"another program answers there: {answer!r}"
        if answer
        else "it closed the connection"
      )
    time.sleep(_RETRY_SECS)
  raise StartError(
    f"process {process_id} of {num_processes} waited {timeout_secs:g} s for "
    f"process 0, the coordinator at {address}: {last}. {_advice(address)}"
  )
