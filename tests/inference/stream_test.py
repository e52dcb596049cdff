"""Clips stream through a function in equal batches, one batch ahead."""

import numpy as np
import pytest

from marlin_jax.inference import stream


def clips(num: int, taken: list[int]):
  for i in range(num):
    taken.append(i)
    yield np.full(3, i, np.float32)


def test_results_keep_the_order_and_batches_have_one_shape():
  shapes = []

  def double(batch):
    shapes.append(batch.shape)
    return 2 * batch

  results = list(stream.encode(double, clips(5, []), 2))
  np.testing.assert_array_equal(results, 2 * np.arange(5)[:, None] * np.ones(3))
  assert shapes == [(2, 3)] * 3
  assert not list(stream.encode(double, clips(0, []), 2))


def test_one_batch_is_taken_ahead_and_no_more():
  taken = []
  results = stream.encode(lambda batch: batch, clips(7, taken), 2)
  next(results)
  assert taken == [0, 1, 2, 3]
  assert len(list(results)) == 6


def test_a_batch_is_in_flight_while_the_next_is_dispatched():
  events = []

  class Pending:
    """Result that notes when its value is asked for."""

    def __init__(self, number):
      self.number = number

    def __array__(self, dtype=None, copy=None):
      events.append(f"value of {self.number}")
      return np.zeros(1)

  def dispatch(number):
    events.append(f"dispatch of {number}")
    return Pending(number)

  assert len(list(stream.encode_batches(dispatch, range(2)))) == 2
  assert events == [
    "dispatch of 0",
    "dispatch of 1",
    "value of 0",
    "value of 1",
  ]


def test_unknown_reductions_are_refused():
  with pytest.raises(ValueError, match="'median', expected one of none, mean"):
    stream.reduced(np.zeros((2, 3)), "median")
