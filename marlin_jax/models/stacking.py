"""Converts the parameters of blocks between separate and stacked arrays.

Separate, {"blocks": {0: {...}, 1: {...}}}, each block has its own arrays.
Stacked, {"blocks": {...}}, each array holds all blocks along a leading axis,
which a scan over blocks needs. Code that visits every array, such as the
optimiser, then compiles as fast for a deep network as for a shallow one. With
unrolled blocks, however, stacked arrays are sliced and their gradients
concatenated, which on CPU takes 5% of B's step.

A tree is nested dicts, or a pytree that contains them, such as a TrainState.
The block numbers are strings in a tree from a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Pytree = Any


def are_stacked(tree: Pytree) -> bool:
  """Returns True if the first stack of blocks in a tree is stacked.

  False if there are no blocks.
  """
  stacked = []
  _at_blocks(tree, lambda blocks: stacked.append(_separate(blocks) is None))
  return bool(stacked) and stacked[0]


def stack(
  tree: Pytree, stack_leaves: Callable[[Sequence[Any]], Any] = jnp.stack
) -> Pytree:
  """Returns the tree with stacked blocks.

  Args:
    tree: see the module.
    stack_leaves: leaves of all blocks -> stacked leaf.
  """

  def stacked(blocks):
    separate = _separate(blocks)
    if separate is None:
      return blocks
    return jax.tree.map(lambda *leaves: stack_leaves(leaves), *separate)

  return _at_blocks(tree, stacked)


def unstack(
  tree: Pytree, take: Callable[[Any, int], Any] = lambda leaf, i: leaf[i]
) -> Pytree:
  """Returns the tree with separate blocks.

  Args:
    tree: see the module.
    take: stacked leaf and block number -> leaf of that block.
  """

  def unstacked(blocks):
    separate = _separate(blocks)
    if separate is None:
      depth = jax.tree.leaves(blocks)[0].shape[0]
      separate = [
        jax.tree.map(lambda leaf, i=i: take(leaf, i), blocks)
        for i in range(depth)
      ]
    return dict(enumerate(separate))

  return _at_blocks(tree, unstacked)


def in_form_of(like: Pytree, tree: Pytree) -> Pytree:
  """Returns the tree with blocks stacked or separate, as in `like`."""
  return stack(tree) if are_stacked(like) else unstack(tree)


def _at_blocks(tree, change):
  def visit(node):
    if not isinstance(node, dict):
      return node
    return {
      key: change(value) if key == "blocks" else _at_blocks(value, change)
      for key, value in node.items()
    }

  return jax.tree.map(visit, tree, is_leaf=lambda node: isinstance(node, dict))


def _separate(blocks) -> list | None:
  """Returns the blocks in order; None if they are stacked."""
  if not all(str(key).isdigit() for key in blocks):
    return None
  return [blocks[key] for key in sorted(blocks, key=int)]
