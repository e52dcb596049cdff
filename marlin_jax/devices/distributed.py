"""Several processes that train as one: start, agree, stop and leave together.

With a single process all of this does nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from marlin_jax.devices.rendezvous import StartError, meet

# A process that waits in vain for the others to end gives up after this.
_SHUTDOWN_SECS = 60
# jax's own timeout ends the process with a stack trace: ours comes first.
_GRACE_SECS = 30
# Exit code of what may go well when it is tried again, unlike a refusal's 1:
# the launchers in tools/ do so.
TRY_AGAIN = os.EX_TEMPFAIL
# What says that a cluster has started several of us.
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
  """Joins the other processes, where there are any.

  To be called before jax touches a device.

  Args:
    settings: config.distributed, see configs/pretrain_b.py.

  Raises:
    StartError: they did not come together; says who is missing, as far as
      known, where they were expected and what to check.
  """
  address, num, me = who(settings)
  if not address:
    return
  # Its SIGTERM handler would swallow the signal until the training loop, which
  # has its own, is reached.
  jax.config.update("jax_enable_preemption_service", False)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  if address == "auto":
    _initialise_by_cluster(settings.timeout_secs)
    return
  meet(address, num, me, settings.timeout_secs)
  jax.distributed.initialize(
    address,
    num,
    me,
    initialization_timeout=settings.timeout_secs + _GRACE_SECS,
    shutdown_timeout_seconds=_SHUTDOWN_SECS,
  )


def who(settings) -> tuple[str, int, int]:
  """Coordinator ('': none, or 'auto'), number of processes, own number."""
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
    # Set by srun alone: not in a shell that merely holds an allocation.
    or int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1
    or int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
  )
  return ("auto" if several else ""), 0, 0


def _initialise_by_cluster(timeout_secs: int) -> None:
  """Lets jax find the others as the cluster describes them."""
  told = [f"{k}={v}" for k in CLUSTER_VARIABLES if (v := os.environ.get(k))]
  known = ", ".join(told) or "nothing in the environment"

  def give_up():
    # Only a thread can: the process is inside jax, which does not return. What
    # it has found out it keeps to itself.
    from jax._src import distributed as inside

    address = inside.global_state.coordinator_address or "no known address"
    leave(
      f"error: the processes that the cluster describes ({known}) did not come "
      f"together within {timeout_secs} s, with the coordinator, process 0, at "
      f"{address}: not all have started, or they do not reach it. Look at the "
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
      f"no cluster was recognised that says who belongs together ({known}): "
      f"{e} Set config.distributed.coordinator=host:port, num_processes and "
      "process_id, or config.distributed.coordinator=none to train alone."
    ) from e
  finally:
    timer.cancel()


# --- agreeing -----------------------------------------------------------------


@contextlib.contextmanager
def leader_first() -> Iterator[None]:
  """Process 0 runs what is inside, and only then the others do."""
  is_leader = jax.process_index() == 0
  if not is_leader:
    multihost_utils.sync_global_devices("leader_first")
  yield
  if is_leader:
    multihost_utils.sync_global_devices("leader_first")


def smallest(value: int) -> int:
  """The smallest of the processes' values, on each of them."""
  if jax.process_count() == 1:
    return value
  # As bytes: jax would cut an int64 to 32 bits.
  own = np.frombuffer(np.int64(value).tobytes(), np.uint8)
  everyones = np.ascontiguousarray(multihost_utils.process_allgather(own))
  return int(everyones.view(np.int64).min())


def check_same(facts: dict[str, Any]) -> None:
  """Makes sure that all processes are about to do the same.

  Args:
    facts: what they must agree in; survives JSON.

  Raises:
    StartError: on every process; where they differ from process 0, names the
      facts.
  """
  if jax.process_count() == 1:
    return
  text = json.dumps(facts, sort_keys=True).encode()
  longest = -smallest(-len(text))
  padded = np.zeros(longest, np.uint8)
  padded[: len(text)] = np.frombuffer(text, np.uint8)
  everyones = multihost_utils.process_allgather(padded)
  theirs = [json.loads(bytes(row).rstrip(b"\0")) for row in everyones]
  lines = [
    f"  process {i}: {key} is {other.get(key)!r}, process 0: "
    f"{theirs[0].get(key)!r}"
    for i, other in enumerate(theirs)
    for key in sorted(theirs[0].keys() | other.keys())
    if other.get(key) != theirs[0].get(key)
  ]
  if lines:
    raise StartError(
      "the processes were not started alike:\n" + "\n".join(lines[:20])
    )


class StopTogether:
  """Turns a signal that any process received into one stop step for all.

  Every round each process puts its signal into an array of a few bytes, whose
  maximum the devices take behind the step that they are busy with. It is read
  a round later, when it is known: nobody waits for it.
  """

  def __init__(self, mesh: Mesh):
    self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._largest = jax.jit(
      jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec())
    )
    self._asked = None

  def __call__(self, received: int | None) -> int | None:
    """To be called by all processes, once in each round.

    Args:
      received: the signal that this process has received.

    Returns:
      The signal to stop for, in the same round everywhere, or None.
    """
    if jax.process_count() == 1:
      return received
    answer = self._asked
    num_local = len(self._sharding.addressable_devices)
    self._asked = self._largest(
      jax.make_array_from_process_local_data(
        self._sharding, np.full(num_local, received or 0, np.int32)
      )
    )
    return (answer is not None and int(answer)) or None


# --- leaving ------------------------------------------------------------------


def leave(
  message: str, *, code: int = 1, at_once: bool | None = None
) -> NoReturn:
  """Ends this process with an error.

  Args:
    message: printed to stderr.
    code: exit code.
    at_once: skip all that Python does at its end, which would wait for the
      other processes, who wait for this one. Default: where there are others.
  """
  if at_once is None:
    at_once = jax.distributed.is_initialized()
  print(message, file=sys.stderr, flush=True)
  if not at_once:
    sys.exit(code)
  sys.stdout.flush()
  os._exit(code)


@contextlib.contextmanager
def leaving_on_errors() -> Iterator[None]:
  """An unforeseen exception inside, as when another process has gone, ends this
  one; see `leave`. TRY_AGAIN is its exit code.
  """
  try:
    yield
  except Exception:
    whose = ""
    if jax.distributed.is_initialized():
      whose = f"process {jax.process_index()} of {jax.process_count()}:\n"
    leave(whose + traceback.format_exc(), code=TRY_AGAIN)
