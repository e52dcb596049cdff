"""Regions are drawn in colours that a reader can tell apart."""

import numpy as np

from data_prep.inspection import region_pictures
from marlin_jax.records import schema


def test_overlay_tints_regions_and_leaves_background():
  frame = np.full((224, 224, 3), 100, np.uint8)
  labels = np.zeros((224, 224), np.uint8)
  labels[50:100, 50:100] = 10
  picture = region_pictures.overlay(frame, labels, opacity=0.5)
  np.testing.assert_array_equal(picture[labels == 0], 100)
  expected = np.round(0.5 * 100 + 0.5 * region_pictures.COLOURS[10])
  np.testing.assert_array_equal(picture[75, 75], expected)
  np.testing.assert_array_equal(picture[50, 75], region_pictures.COLOURS[10])


def test_regions_have_colours_that_can_be_told_apart():
  colours = region_pictures.COLOURS.astype(int)
  assert len(colours) == len(schema.REGIONS)
  distance = np.abs(colours[:, None] - colours[None]).sum(axis=-1)
  assert distance[~np.eye(len(colours), dtype=bool)].min() >= 60
