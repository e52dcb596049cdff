"""Several processes that train as one: start, agree, stop and exit together.

With a single process the functions do nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from marlin_jax.devices import coordination
from marlin_jax.devices.rendezvous import StartError, meet
from marlin_jax.records import cli
from marlin_jax.records.cli import UserError

# Longest wait for the other processes to exit; jax aborts all of them after it.
_SHUTDOWN_SECS = 600
# jax's own timeout aborts the process with a stack trace, so it comes later
# than the timeout here.
_GRACE_SECS = 30
# Exit code of failures that may not recur; the launchers in tools/ start the
# run again. A refusal exits with 1.
TRY_AGAIN = os.EX_TEMPFAIL
# Environment variables by which a cluster says that it started several
# processes.
CLUSTER_VARIABLES = (
  "SLURM_STEP_NUM_TASKS",
  "SLURM_STEP_NODELIST",
  "SLURM_PROCID",
  "OMPI_COMM_WORLD_SIZE",
  "OMPI_COMM_WORLD_RANK",
  "TPU_WORKER_HOSTNAMES",
  "TPU_WORKER_ID",
  "MEGASCALE_COORDINATOR_ADDRESS",
  "JAX_COORDINATOR_ADDRESS",
  "JAX_NUM_PROCESSES",
  "JAX_PROCESS_ID",
)


def initialise(settings: Any) -> None:
  """Joins the other processes of the run, if there are any.

  Call it before jax uses a device.

  Args:
    settings: config.distributed, see configs/pretrain_b.py.

  Raises:
    StartError: not all processes started; names the missing ones if they are
      known, the coordinator's address and what to check.
  """
  address, num_processes, process_id = process_numbers(settings)
  if not address:
    return
  # The service's SIGTERM handler would swallow the signal until the training
  # loop installs its own.
  jax.config.update("jax_enable_preemption_service", False)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  if address == "auto":
    _initialise_by_cluster(settings.timeout_secs)
  else:
    meet(address, num_processes, process_id, settings.timeout_secs)
    jax.distributed.initialize(
      address,
      num_processes,
      process_id,
      initialization_timeout=settings.timeout_secs + _GRACE_SECS,
      shutdown_timeout_seconds=_SHUTDOWN_SECS,
    )
  coordination.watch_for_the_end()


class Automatic:
  """config.distributed of a command that has none: as the environment says."""

  coordinator = ""
  timeout_secs = 300


def run_task(task: cli.Task | None, work: Callable[[cli.Task], None]) -> None:
  """Does a part of work that is divided by videos.

  Args:
    task: the part; None: joins the other processes, if the environment names
      any, and takes the part of this one. They share no computation, and leave
      together.
    work: does it.

  Raises:
    StartError: see `initialise`.
  """
  if task is None:
    initialise(Automatic())
    task = cli.Task(jax.process_index(), jax.process_count())
  with ending_together():
    work(task)
    coordination.wait_for_all()


def process_numbers(settings: Any) -> tuple[str, int, int]:
  """Resolves config.distributed and the environment.

  Returns:
    Coordinator (host:port, 'auto', or '' for a run of one process), number of
    processes, number of this process. With 'auto' jax finds the numbers.
  """
  address = settings.coordinator
  if address == "none":
    return "", 1, 0
  if address not in ("", "auto"):
    return address, settings.num_processes, settings.process_id
  env = os.environ
  if (
    not address
    and {
      "JAX_COORDINATOR_ADDRESS",
      "JAX_NUM_PROCESSES",
      "JAX_PROCESS_ID",
    }
    <= env.keys()
  ):
    return (
      env["JAX_COORDINATOR_ADDRESS"],
      int(env["JAX_NUM_PROCESSES"]),
      int(env["JAX_PROCESS_ID"]),
    )
  several = (
    address == "auto"
    or "JAX_COORDINATOR_ADDRESS" in env
    or "MEGASCALE_COORDINATOR_ADDRESS" in env
    or "," in env.get("TPU_WORKER_HOSTNAMES", "")
    # Only srun sets it; a shell that holds an allocation does not have it.
    or int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1
    or int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
  )
  return ("auto" if several else ""), 0, 0


def _initialise_by_cluster(timeout_secs: int) -> None:
  """Lets jax find the processes as the cluster describes them."""
  variables = [
    f"{k}={v}" for k in CLUSTER_VARIABLES if (v := os.environ.get(k))
  ]
  described = ", ".join(variables) or "nothing in the environment"

  def give_up():
    # A thread does it, because the main thread is inside jax, which does not
    # return. jax has no public access to the address that it found.
    from jax._src import distributed as jax_internals

    address = (
      jax_internals.global_state.coordinator_address or "no known address"
    )
    leave(
      f"error: the processes that the cluster describes ({described}) did not "
      f"connect within {timeout_secs} s to the coordinator, process 0, at "
      f"{address}: not all have started, or they cannot reach it. Look at the "
      "output of the others. To name them yourself set config.distributed."
      "coordinator=host:port, num_processes and process_id; config.distributed."
      "timeout_secs says how long to wait",
      code=TRY_AGAIN,
      at_once=True,
    )

  timer = threading.Timer(timeout_secs, give_up)
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(
      initialization_timeout=timeout_secs + _GRACE_SECS,
      shutdown_timeout_seconds=_SHUTDOWN_SECS,
    )
  except (ValueError, RuntimeError) as e:
    raise StartError(
      f"jax recognised no cluster that describes the processes ({described}): "
      f"{e} Set config.distributed.coordinator=host:port, num_processes and "
      "process_id, or config.distributed.coordinator=none to train alone."
    ) from e
  finally:
    timer.cancel()


# --- agreeing -----------------------------------------------------------------


@contextlib.contextmanager
def process_0_first() -> Iterator[None]:
  """Yields to process 0 first, then to the other processes."""
  is_process_0 = jax.process_index() == 0
  if not is_process_0:
    coordination.wait_for_all()
  yield
  if is_process_0:
    coordination.wait_for_all()


def smallest(value: int) -> int:
  """Returns the smallest of the processes' values, on every process."""
  if jax.process_count() == 1:
    return value
  # As bytes, because jax would truncate an int64 to 32 bits.
  own = np.frombuffer(np.int64(value).tobytes(), np.uint8)
  gathered = np.ascontiguousarray(multihost_utils.process_allgather(own))
  return int(gathered.view(np.int64).min())


def set_on_all(flags: Sequence[bool]) -> list[bool]:
  """Returns, on every process, which flags are set on all processes."""
  if jax.process_count() == 1:
    return list(flags)
  gathered = multihost_utils.process_allgather(np.array(flags, bool))
  return gathered.all(axis=0).tolist()


def shared_values(config: dict[str, Any]) -> dict[str, Any]:
  """Returns what `check_same` is to check of a flat configuration."""
  return {
    f"config.{key}": value
    for key, value in config.items()
    if not key.startswith("distributed.")
  }


def check_same(facts: dict[str, Any]) -> None:
  """Checks that all processes have the same values.

  Args:
    facts: values by name, ready for JSON.

  Raises:
    StartError: on every process; lists the values that differ from process 0.
  """
  if jax.process_count() == 1:
    return
  text = json.dumps(facts, sort_keys=True).encode()
  longest = -smallest(-len(text))
  padded = np.zeros(longest, np.uint8)
  padded[: len(text)] = np.frombuffer(text, np.uint8)
  gathered = multihost_utils.process_allgather(padded)
  by_process = [json.loads(bytes(row).rstrip(b"\0")) for row in gathered]
  expected = by_process[0]
  lines = [
    f"  process {i}: {key} is {values.get(key)!r}, process 0: "
    f"{expected.get(key)!r}"
    for i, values in enumerate(by_process)
    for key in sorted(expected.keys() | values.keys())
    if values.get(key) != expected.get(key)
  ]
  if lines:
    raise StartError(
      "the processes were started with different values; start all of them "
      "with the same command, code and data:\n" + "\n".join(lines[:20])
    )


class Requests:
  """Makes all processes follow the requests of any at the same step.

  In every round each process puts its requests into a small array, and the
  devices compute the maximum after the step that they are running. The
  processes read the result one round later, when it is ready, so that no
  process waits for it.
  """

  def __init__(self, mesh: Mesh):
    self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._largest = jax.jit(
      jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec())
    )
    self._pending = None

  def __call__(
    self, signum: int | None, saves: bool = False
  ) -> tuple[int | None, bool]:
    """Exchanges requests; all processes call it once in each round.

    Args:
      signum: signal that this process received, a request to save and stop.
      saves: request to save and go on.

    Returns:
      The signal to stop for, or None, and True to save: in the same round on
      every process.
    """
    if jax.process_count() == 1:
      return signum, saves
    previous = self._pending
    num_local = len(self._sharding.addressable_devices)
    # A signal is more than a request to save: whoever stops saves too.
    request = 2 * (signum or 0) + saves
    self._pending = self._largest(
      jax.make_array_from_process_local_data(
        self._sharding, np.full(num_local, request, np.int32)
      )
    )
    signum, saves = divmod(0 if previous is None else int(previous), 2)
    return signum or None, bool(saves)


# --- exiting ------------------------------------------------------------------


def leave(
  message: str, *, code: int = 1, at_once: bool | None = None
) -> NoReturn:
  """Ends this process with an error.

  Args:
    message: printed to stderr.
    code: exit code.
    at_once: exit without Python's shutdown, which would wait for the other
      processes while they wait for this one. None: True if there are other
      processes.
  """
  if at_once is None:
    at_once = jax.distributed.is_initialized()
  print(message, file=sys.stderr, flush=True)
  if not at_once:
    sys.exit(code)
  sys.stdout.flush()
  os._exit(code)


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
  """Ends all processes when the block fails in one of them.

  With a single process errors are raised.
  """
  try:
    yield
  except BaseException as e:
    if not jax.distributed.is_initialized():
      raise
    prefix = f"process {jax.process_index()} of {jax.process_count()}"
    if isinstance(e, UserError):
      coordination.end_all(f"error: {e}", e.exit_code)
    if isinstance(e, KeyboardInterrupt):
      coordination.end_all(f"{prefix}: interrupted", cli.INTERRUPTED)
    coordination.end_all(f"{prefix}:\n{traceback.format_exc()}", TRY_AGAIN)


@contextlib.contextmanager
def leaving_on_errors() -> Iterator[None]:
  """As `ending_together`; an unforeseen error ends a single process likewise.

  The loss of another process raises one, for example.
  """
  try:
    with ending_together():
      yield
  except Exception:
    coordination.end_all(traceback.format_exc(), TRY_AGAIN)
