"""Masking of tokens: fasking and its alternatives.

Fasking (facial-region guided tube masking, paper section 3) chooses the VISIBLE
tokens from background and skin first, so that eyes, nose, mouth and hair are
masked and must be reconstructed. The number of visible tokens is the same for
every clip, so that batches have one static shape.

Axes: B batch, T tubelets, S = h*w spatial positions, N = T*S tokens (t h w),
V visible, M masked, L region labels in the order in which they become visible,
G groups of regions.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from marlin_jax.pretraining.configuration import MASKING_STRATEGIES

# Label codes, positions in records.schema.REGIONS, grouped as in the paper.
BACKGROUND, SKIN = 0, 1
COMPONENTS = (
  (2, 4),  # right brow and eye
  (3, 5),  # left brow and eye
  (6,),  # nose
  (7, 8, 9),  # lips and inner mouth
  (10,),  # hair
)


@dataclasses.dataclass(frozen=True)
class Masking:
  """A masking strategy over a token grid.

  Attributes:
    strategy: one of MASKING_STRATEGIES. All but crfr_p choose candidates, of
      which V are drawn at random to be visible. fasking and fasking_opp: the
      patches of some regions; random: all tokens; tube: ceil((1 - ratio) * S)
      spatial positions at all times; frame: ceil((1 - ratio) * T) whole
      tubelets. crfr_p hides one region whole, and an equal share of each of
      the others (Wang et al. 2025, FSFM, section 3.1, where it is for images:
      here the region is hidden in all tubelets).
    ratio: share of masked tokens, in (0, 1).
    grid: tokens along t, h, w.

  Raises:
    ValueError: at construction, if the strategy is unknown or no token would be
      visible.
  """

  strategy: str
  ratio: float
  grid: tuple[int, int, int] = (8, 14, 14)

  def __post_init__(self):
    if self.strategy not in MASKING_STRATEGIES:
      raise ValueError(
        f"strategy is {self.strategy!r}, expected one of "
        f"{', '.join(MASKING_STRATEGIES)}"
      )
    if not 0 < self.ratio < 1:
      raise ValueError(
        f"ratio is {self.ratio}, expected a value between 0 and 1"
      )
    if not self.num_visible:
      raise ValueError(
        f"ratio is {self.ratio}, which leaves no token visible of {self.grid} "
        f"with strategy {self.strategy}; expected a lower ratio"
      )

  @property
  def needs_regions(self) -> bool:
    """True if the masks depend on the region bits."""
    return self.strategy.startswith("fasking") or self.strategy == "crfr_p"

  @property
  def num_tokens(self) -> int:
    return math.prod(self.grid)

  @property
  def num_visible(self) -> int:
    """Number of visible tokens, V: floor((1 - ratio) * N).

    156 of 1568 tokens at ratio 0.9. It is the same for every strategy, so that
    they can be compared.
    """
    # 1 - 0.9 is slightly less than 0.1: an exact product must not be rounded
    # down.
    return math.floor((1 - self.ratio) * self.num_tokens + 1e-6)

  def __call__(
    self, regions: jax.Array, keys: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Splits the tokens of each clip into visible and masked ones.

    Args:
      regions: uint16 (B, T, h, w), region bits of each tubelet's first frame.
      keys: B jax keys, one per clip, so that a clip's mask depends neither on
        its neighbours nor on how the batch is split.

    Returns:
      visible int32 (B, V) and masked int32 (B, M), ascending token numbers that
      together contain each of 0..N-1 exactly once.
    """
    return jax.vmap(self._split)(regions, keys)

  def hidden_region(self, regions: jax.Array, keys: jax.Array) -> jax.Array:
    """Returns the tokens of the region that crfr_p hides whole.

    Args:
      regions, keys: as of `__call__`.

    Returns:
      bool (B, N). If a region is larger than M, some of it is visible.
    """
    return jax.vmap(self._hidden_group)(regions, keys)

  def _hidden_group(self, regions, key):
    group = jax.random.randint(jax.random.fold_in(key, 1), (), 0, NUM_HIDEABLE)
    return region_groups(regions.reshape(-1))[group]

  def _split(self, regions, key):
    order = jnp.argsort(self._rank(regions, key))
    visible, masked = jnp.split(order.astype(jnp.int32), [self.num_visible])
    return jnp.sort(visible), jnp.sort(masked)

  def _rank(self, regions, key):
    """Returns float (N,); the V tokens with the smallest values are visible."""
    t, h, w = self.grid
    if self.strategy == "random":
      return jax.random.uniform(key, (t * h * w,))
    if self.strategy in ("tube", "frame"):
      drop_key = jax.random.fold_in(key, 1)
      if self.strategy == "tube":
        candidates = jnp.tile(self._draw_units(key, h * w), (t, 1))
      else:
        candidates = jnp.repeat(self._draw_units(key, t), h * w)
      return _candidates_first(candidates, drop_key)
    if self.strategy == "crfr_p":
      return _equal_shares_first(
        self._hidden_group(regions, key),
        region_groups(regions.reshape(-1)),
        key,
      )
    order_key, drop_key = jax.random.split(key)
    components = jax.random.permutation(order_key, len(COMPONENTS))
    candidates = fasking_candidates(
      regions.reshape(t, h * w),
      label_order(components, opposite=self.strategy == "fasking_opp"),
      (1 - self.ratio) * h * w,
    )
    return _candidates_first(candidates, drop_key)

  def _draw_units(self, key, num_units):
    """Returns bool (num_units,), True for ceil((1 - ratio) * num_units)."""
    num_drawn = math.ceil((1 - self.ratio) * num_units - 1e-6)
    draw = jax.random.uniform(key, (num_units,))
    return (
      jnp.zeros(num_units, bool).at[jnp.argsort(draw)[:num_drawn]].set(True)
    )


def _candidates_first(candidates, key):
  """Ranks candidates at random, then the other tokens at random: float (N,)."""
  draw = jax.random.uniform(key, (candidates.size,))
  return jnp.where(candidates.reshape(-1), draw, 1 + draw)


# Groups of CRFR-P that may be hidden: the first of `region_groups`.
NUM_HIDEABLE = 6


def region_groups(regions: jax.Array) -> jax.Array:
  """Returns the tokens of each of FSFM's groups of regions.

  Args:
    regions: uint16 (N,), region bits.

  Returns:
    bool (8, N): brows, eyes, nose, mouth, outline of the face (skin beside
    hair or background), hair, skin, background. Groups overlap.
  """

  def has(*labels):
    return (regions & sum(1 << label for label in labels)) > 0

  outline = has(SKIN) & has(10, BACKGROUND)
  return jnp.stack(
    [
      *(has(2, 3), has(4, 5), has(6), has(7, 8, 9), outline),
      *(has(10), has(SKIN), has(BACKGROUND)),
    ]
  )


def _equal_shares_first(hidden, groups, key):
  """Ranks tokens so that the first hold an equal share of each group.

  Args:
    hidden: bool (N,), tokens that come last.
    groups: bool (G, N). A token counts for the first of its groups; those
      without one are a group too.
    key: a jax key.

  Returns:
    float (N,).
  """
  draw_key, start_key = jax.random.split(key)
  draw = jax.random.uniform(draw_key, hidden.shape)
  group = jnp.where(groups.any(0), jnp.argmax(groups, 0), len(groups))
  group = jnp.where(hidden, len(groups) + 1, group)
  size = jnp.bincount(group, length=len(groups) + 2)
  # Place of each token among those of its group, in random order.
  place = (
    jnp.argsort(jnp.lexsort((draw, group))) - (size.cumsum() - size)[group]
  )
  start = jax.random.uniform(start_key, size.shape)
  return jnp.where(hidden, 1 + draw, (place + start[group]) / size[group])


def num_decoded(num_masked: int, decoder_ratio: float) -> int:
  """Returns how many masked tokens the decoder predicts, at least 1."""
  return max(round(num_masked * (1 - decoder_ratio)), 1)


def running_cells(
  masked: jax.Array,
  grid: tuple[int, int, int],
  keys: jax.Array,
  num_kept: int,
) -> jax.Array:
  """Selects masked tokens evenly over space and time.

  Running cell masking: each 2x2 cell of patches cycles through its positions
  over time (Qing et al. 2023, MAR, section 3.2; used as the decoder's mask by
  Wang et al. 2023, VideoMAE V2, section 3.2).

  Args:
    masked: int (B, M), ascending.
    grid: tokens along t, h, w.
    keys: B jax keys.
    num_kept: M', number of tokens to select.

  Returns:
    int32 (B, M'), ascending.
  """
  t, h, w = np.unravel_index(np.arange(math.prod(grid)), grid)
  # Positions in a cell, clockwise, so that consecutive ones are neighbours.
  position = np.where(h % 2, 3 - w % 2, w % 2)

  def keep(masked, key):
    start_key, tie_key = jax.random.split(key)
    start = jax.random.randint(start_key, (), 0, 4)
    turn = (jnp.asarray(position - t)[masked] + start) % 4
    rank = turn + jax.random.uniform(tie_key, masked.shape)
    return jnp.sort(masked[jnp.argsort(rank)[:num_kept]])

  return jax.vmap(keep)(masked, keys)


def label_order(components: jax.Array, *, opposite: bool = False) -> jax.Array:
  """Returns the order in which labels become visible.

  Args:
    components: int (5,), a permutation of the indices of COMPONENTS.
    opposite: put skin and background last, as fasking_opp does.

  Returns:
    int32 (11,) label codes.
  """
  slots = np.full((len(COMPONENTS), max(map(len, COMPONENTS))), -1)
  for i, labels in enumerate(COMPONENTS):
    slots[i, : len(labels)] = labels
  ordered = jnp.asarray(slots, jnp.int32)[components].reshape(-1)
  # The stable sort moves empty slots behind the nine labels.
  ordered = ordered[jnp.argsort(ordered < 0, stable=True)][:9]
  if opposite:
    return jnp.append(ordered, jnp.array([SKIN, BACKGROUND], jnp.int32))
  return jnp.append(jnp.array([BACKGROUND, SKIN], jnp.int32), ordered)


def fasking_candidates(
  regions: jax.Array, labels: jax.Array, min_candidates: float
) -> jax.Array:
  """Returns the patches that fasking may leave visible.

  Labels are visited in order, in each tubelet separately. A patch becomes a
  candidate if any of its pixels has the label. Visiting stops after the first
  label with which there are at least `min_candidates` candidates. In a tubelet
  without a parsed face all patches are candidates.

  Args:
    regions: uint16 (T, S), region bits.
    labels: int (L,), from `label_order`.
    min_candidates: least number of candidates per tubelet.

  Returns:
    bool (T, S).
  """
  shift = labels.astype(jnp.uint16)[:, None, None]
  has_label = (regions[None] >> shift) & 1  # (L, T, S)
  visited = jax.lax.cummax(has_label, axis=0) > 0
  # The tolerance undoes the rounding of 1 - ratio; counts are integers.
  enough = visited.sum(-1) >= min_candidates - 1e-4  # (L, T)
  last = jnp.where(enough.any(0), jnp.argmax(enough, 0), len(labels) - 1)
  candidates = jnp.take_along_axis(visited, last[None, :, None], axis=0)[0]
  no_face = ~(regions > 0).any(-1, keepdims=True)
  return candidates | no_face
