"""Messages between the processes of a run, through jax's coordination service.

They do not use the devices: any thread may send them, a step that is running
does not delay them, and a wait has no practical time limit. With a single
process the functions do nothing.

A process that ends alone takes the others with it: jax aborts them with SIGABRT
and a stack trace, and a launcher starts the run again. `end_all` therefore ends
all processes with the same message and exit code.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import sys
import threading
import time
from typing import Any, NoReturn

import jax

_NO_LIMIT_MS = 7 * 24 * 3600 * 1000
_ENDED = "marlin_jax/ended"
# Keys of the processes that know of the end.
_INFORMED = "marlin_jax/informed"
# Time between two looks at _ENDED.
_POLL_SECS = 1.0
# Longest wait of process 0 for the others to learn of the end.
_INFORM_SECS = 30
# Time for the others to exit before process 0 does: it hosts the service.
_EXIT_SECS = 1.0

_meetings = itertools.count()
# Held by the thread that ends this process.
_ending = threading.Lock()


def _service() -> Any:
  """Returns the client of the coordination service; None for one process."""
  # jax has no public access to it.
  from jax._src import distributed as jax_internals

  return jax_internals.global_state.client


def wait_for_all() -> None:
  """Returns when all processes have called it; for the main thread."""
  if service := _service():
    service.wait_at_barrier(f"marlin_jax/meet/{next(_meetings)}", _NO_LIMIT_MS)


def broadcast(key: str, text: str | None) -> str:
  """Returns the text of process 0 on every process.

  Args:
    key: identifies the message; not in use.
    text: the message on process 0; ignored on the others.
  """
  if not (service := _service()):
    return text
  if jax.process_index():
    return service.blocking_key_value_get(key, _NO_LIMIT_MS)
  service.key_value_set(key, text)
  return text


def gather(key: str, text: str) -> list[str] | None:
  """Collects a text from every process.

  Args:
    key: identifies the message; not in use.
    text: text of this process.

  Returns:
    On process 0 the texts by process number, on the others None.
  """
  if not (service := _service()):
    return [text]
  if index := jax.process_index():
    service.key_value_set(f"{key}/{index}", text)
    return None
  texts = [text]
  for index in range(1, jax.process_count()):
    texts.append(service.blocking_key_value_get(f"{key}/{index}", _NO_LIMIT_MS))
    service.key_value_delete(f"{key}/{index}")
  return texts


# --- ending -------------------------------------------------------------------


def watch_for_the_end() -> None:
  """Starts a thread that ends this process when another calls `end_all`."""
  stop = threading.Event()
  thread = threading.Thread(target=_watch, args=(stop,), daemon=True)
  thread.start()

  def finish():
    # Before jax disconnects from the service.
    stop.set()
    thread.join(_INFORM_SECS)

  atexit.register(finish)


def _watch(stop: threading.Event) -> None:
  service = _service()
  while not stop.wait(_POLL_SECS):
    try:
      text = service.key_value_try_get(_ENDED)
    except jax.errors.JaxRuntimeError:
      continue  # no process has ended the run
    if not _ending.acquire(blocking=False):
      return
    ended = json.loads(text)
    message = f"process {ended['process']} ended the run:\n{ended['message']}"
    _end(service, message, ended["code"])


def end_all(message: str, code: int) -> NoReturn:
  """Ends all processes with an error.

  Does not run Python's shutdown, in which the processes wait for each other.

  Args:
    message: printed to stderr by every process. If several processes end the
      run, each prints its own.
    code: exit code of every process.
  """
  service = _service()
  if not service:
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)
  _ending.acquire()  # the thread of `_watch` may be ending this process
  ended = {"process": jax.process_index(), "code": code, "message": message}
  try:
    service.key_value_set(_ENDED, json.dumps(ended))
  except jax.errors.JaxRuntimeError:
    # Another process was first, or the service is gone.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      code = json.loads(service.key_value_try_get(_ENDED))["code"]
  _end(service, message, code)


def _end(service: Any, message: str, code: int) -> NoReturn:
  print(message, file=sys.stderr, flush=True)
  sys.stdout.flush()
  # The service may be gone.
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    service.key_value_set(f"{_INFORMED}/{jax.process_index()}", "")
    if jax.process_index() == 0:
      deadline = time.monotonic() + _INFORM_SECS
      while (
        len(service.key_value_dir_get(f"{_INFORMED}/")) < jax.process_count()
        and time.monotonic() < deadline
      ):
        time.sleep(0.1)
      time.sleep(_EXIT_SECS)
  os._exit(code)
