"""The parameters of a stack of blocks: block by block, or joined.

By block, {"blocks": {0: {...}, 1: {...}}}, each array is one block's own.
Joined, {"blocks": {...}}, each is that of all blocks, along a leading axis:
what a loop over blocks wants. What is done to every array, as by the optimiser,
then compiles no longer for a deep network than for a shallow one; but for
blocks that run one by one it has to be cut up and their gradients joined, which
on CPU takes 5% of B's step.

A tree is nested dicts, or anything that holds them, such as a TrainState. Its
keys may be strings where it comes from a file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

Pytree = Any


def are_joined(tree: Pytree) -> bool:
  """Whether the first stack of blocks in a tree is joined; False: no stack."""
  found = []
  _at_blocks(tree, lambda blocks: found.append(_one_by_one(blocks) is None))
  return bool(found) and found[0]


def join(
  tree: Pytree, stack: Callable[[Sequence[Any]], Any] = jnp.stack
) -> Pytree:
  """The tree with all stacks of blocks joined; `stack` puts leaves together."""

  def joined(blocks):
    each = _one_by_one(blocks)
    if each is None:
      return blocks
    return jax.tree.map(lambda *leaves: stack(leaves), *each)

  return _at_blocks(tree, joined)


def split(
  tree: Pytree, take: Callable[[Any, int], Any] = lambda leaf, i: leaf[i]
) -> Pytree:
  """The tree with all stacks block by block; `take` takes a block's part."""

  def by_block(blocks):
    each = _one_by_one(blocks)
    if each is None:
      depth = jax.tree.leaves(blocks)[0].shape[0]
      each = [
        jax.tree.map(lambda leaf, i=i: take(leaf, i), blocks)
        for i in range(depth)
      ]
    return dict(enumerate(each))

  return _at_blocks(tree, by_block)


def in_form_of(like: Pytree, tree: Pytree) -> Pytree:
  """The tree, joined if `like` is, else block by block."""
  return join(tree) if are_joined(like) else split(tree)


def _at_blocks(tree, change):
  def visit(node):
    if not isinstance(node, dict):
      return node
    return {
      key: change(value) if key == "blocks" else _at_blocks(value, change)
      for key, value in node.items()
    }

  return jax.tree.map(visit, tree, is_leaf=lambda node: isinstance(node, dict))


def _one_by_one(blocks) -> list | None:
  """The blocks in order; None: they are joined."""
  if not all(str(key).isdigit() for key in blocks):
    return None
  return [blocks[key] for key in sorted(blocks, key=int)]
