"""Small models with the interfaces of the parsers that classify by colour."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np

from data_prep.regions import bisenet, farl


def colours(num_classes: int) -> np.ndarray:
  """Returns uint8 (num_classes, 3), far apart; black is class 0."""
  levels = (0, 120, 240)
  every = np.array([(r, g, b) for r in levels for g in levels for b in levels])
  return every[:num_classes].astype(np.uint8)


def colour_rule(num_classes: int, mean=0.0, std=1.0):
  """Returns weights (K, 3), bias (K,): logits highest for the nearest colour.

  Args:
    num_classes: K.
    mean, std: what the model expects its input, in [0, 1], to be brought to.
  """
  seen = (colours(num_classes) / 255 - mean) / std
  weights, bias = 2 * seen, -np.square(seen).sum(axis=1)
  return weights.astype(np.float32), bias.astype(np.float32)


def write_onnx(path: Path, num_classes: int) -> None:
  import onnx
  from onnx import TensorProto, helper, numpy_helper

  weights, bias = colour_rule(num_classes, bisenet.MEAN, bisenet.STD)
  side = bisenet.INPUT_SIZE
  graph = helper.make_graph(
    [
      helper.make_node("Conv", ["input", "w", "b"], ["output"]),
      # The published model has outputs of its training heads too.
      helper.make_node("Identity", ["input"], ["other"]),
    ],
    "colours",
    [
      helper.make_tensor_value_info(
        "input", TensorProto.FLOAT, [1, 3, side, side]
      )
    ],
    [
      helper.make_tensor_value_info(
        "output", TensorProto.FLOAT, [1, num_classes, side, side]
      ),
      helper.make_tensor_value_info(
        "other", TensorProto.FLOAT, [1, 3, side, side]
      ),
    ],
    [
      numpy_helper.from_array(weights[..., None, None], "w"),
      numpy_helper.from_array(bias, "b"),
    ],
  )
  model = helper.make_model(
    graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10
  )
  onnx.save(model, path)


def write_script(path: Path, num_classes: int) -> None:
  import torch

  class Colours(torch.nn.Module):
    def __init__(self):
      super().__init__()
      self.conv = torch.nn.Conv2d(3, num_classes, 1)

    def forward(self, images):
      logits = self.conv(images)
      return logits, logits.mean()

  weights, bias = colour_rule(num_classes)
  model = Colours().eval()
  with torch.no_grad():
    model.conv.weight.copy_(torch.from_numpy(weights)[..., None, None])
    model.conv.bias.copy_(torch.from_numpy(bias))
  example = torch.zeros(1, 3, farl.INPUT_SIZE, farl.INPUT_SIZE)
  with warnings.catch_warnings():
    # The published file is a TorchScript, deprecated or not.
    warnings.simplefilter("ignore", DeprecationWarning)
    torch.jit.trace(model, example).save(str(path))
