"""Floating-point operations of a stack of transformer blocks.

Only matrix products count, a fused multiply-add as 2.
"""

from __future__ import annotations

import dataclasses

from marlin_jax.models import vit


@dataclasses.dataclass(frozen=True)
class StackFlops:
  """FLOPs of a stack of transformer blocks on one clip, forward.

  Attributes:
    size: width, depth, heads and MLP of the stack.
    tokens: number of input tokens.
    tokens_out: number of tokens that the last block computes.
  """

  size: vit.Size
  tokens: int
  tokens_out: int

  def _over_blocks(self, block_flops) -> float:
    """Sums block_flops(number of queries) over the blocks."""
    full_blocks = self.size.depth - 1
    return full_blocks * block_flops(self.tokens) + block_flops(self.tokens_out)

  @property
  def attention(self) -> float:
    """FLOPs of attention scores and weighted sums of values."""
    width = self.size.width
    return self._over_blocks(lambda queries: 4 * queries * self.tokens * width)

  @property
  def mlp(self) -> float:
    width, mlp_dim = self.size.width, self.size.mlp_dim
    return self._over_blocks(lambda queries: 4 * queries * width * mlp_dim)

  @property
  def forward(self) -> float:
    # Query and output projections of the queries, key and value of all tokens.
    projections = self._over_blocks(
      lambda queries: 4 * (queries + self.tokens) * self.size.width**2
    )
    return projections + self.attention + self.mlp
