"""Processes meet, or learn which are missing. Here they are threads."""

import socket
import time
from concurrent import futures

import pytest

from marlin_jax.devices.rendezvous import StartError, meet


@pytest.fixture
def address():
  with socket.create_server(("127.0.0.1", 0)) as server:
    port = server.getsockname()[1]
  return f"127.0.0.1:{port}"


def together(address, calls, *, timeout_secs):
  """Calls meet(address, *call) in threads; returns error messages or None."""

  def call(num, me):
    try:
      meet(address, num, me, timeout_secs)
    except StartError as e:
      return str(e)

  with futures.ThreadPoolExecutor() as pool:
    return list(pool.map(lambda args: call(*args), calls))


def test_all_go_on_when_the_last_has_come(address):
  calls = [(4, i) for i in (3, 1, 0, 2)]
  assert together(address, calls, timeout_secs=30) == [None] * 4


def test_a_port_is_free_again_at_once(address):
  for _ in range(2):
    assert together(address, [(2, 0), (2, 1)], timeout_secs=30) == [None] * 2


def test_all_that_came_are_told_who_did_not(address):
  start = time.monotonic()
  messages = together(address, [(4, 0), (4, 2)], timeout_secs=0.5)
  assert time.monotonic() - start < 5
  for message in messages:
    assert "2 of 4 processes" in message
    assert "missing: 1, 3." in message
    assert address in message
    assert "config.distributed.timeout_secs" in message


def test_without_process_0_the_others_name_its_address(address):
  (message,) = together(address, [(2, 1)], timeout_secs=0.5)
  assert f"the coordinator at {address}: Connection refused" in message


def test_another_number_of_processes_is_told_to_both(address):
  messages = together(address, [(2, 0), (3, 1)], timeout_secs=5)
  assert all("number 1 of 3" in message for message in messages)


def test_two_of_one_number_are_told(address):
  messages = together(address, [(3, 0), (3, 1), (3, 1)], timeout_secs=5)
  assert all("two processes came as number 1" in m for m in messages)


def test_a_port_in_use_is_named():
  with socket.create_server(("", 0)) as taken:
    address = f"127.0.0.1:{taken.getsockname()[1]}"
    (message,) = together(address, [(2, 0)], timeout_secs=5)
  assert "cannot listen on port" in message
  assert address in message


def test_strangers_and_those_that_left_are_not_counted(address):
  host, port = address.split(":")
  with futures.ThreadPoolExecutor() as pool:
    first = pool.submit(together, address, [(3, 0)], timeout_secs=2)
    for hello in (b"GET / HTTP/1.1\r\n\r\n", b"marlin_jax 1 of 3\n"):
      while True:
        try:
          with socket.create_connection((host, port)) as stranger:
            stranger.sendall(hello)
          break
        except ConnectionRefusedError:
          assert not first.done()  # process 0 does not listen yet
    messages = together(address, [(3, 2)], timeout_secs=30) + first.result()
  for message in messages:
    assert "2 of 3 processes" in message
    assert "missing: 1." in message
