"""Describes a prepared data set on one self-contained HTML page.

  python -m data_prep.report DATASET_DIR --output report.html

Counts are exact. Charts come from all records of a small data set and from a
sample of a large one; the page says which.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep import storage
from data_prep.inspection import (
  dataset_statistics,
  region_pictures,
)
from data_prep.sources import listing
from marlin_jax.records import cli, extras, folders, html_page, schema
from marlin_jax.records.cli import counted
from marlin_jax.records.html_page import Html, file_name, section, table, tag

if TYPE_CHECKING:
  from data_prep.inspection.dataset_statistics import Statistics, Track
  from data_prep.sources.listing import Label

# Number of crops on the page; each takes about 15 kB.
NUM_CROPS = 24
NUM_WORST = 12
# Rows of a table; the last one counts all others.
MAX_ROWS = 30
MAX_EXAMPLES = 3
# A crop with a shorter side in the source was enlarged.
_FULL_SIZE = float(schema.FRAME_SIZE)


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, 1 after an error, 130 when interrupted."""
  args = _parser().parse_args(argv)

  def work() -> None:
    extras.require("prepare", "data_prep.report")
    text = make(args.dataset_dir, args.max_records)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    folders.write_bytes(args.output, text.encode())
    print(f"{args.output}: {len(text) / 1e6:.1f} MB; open it in a browser")

  return cli.run_command(work, interrupted="No page was written.")


def make(dataset_dir: Path, max_records: int) -> str:
  """Returns the page.

  Args:
    dataset_dir: a folder written by data_prep.prepare.
    max_records: number of records to read, rounded up to whole videos; all if
      the data set holds fewer.

  Raises:
    InspectionError: there is no such data set, or it is damaged.
    OSError: it is in a bucket, and cannot be downloaded.
  """
  name = dataset_dir.resolve().name
  with dataset_statistics.on_disk(dataset_dir, max_records) as folder:
    return _page(name, folder, max_records)


def _page(name: str, dataset_dir: Path, max_records: int) -> str:
  from tqdm import tqdm

  with tqdm(desc="reading", unit=" records") as bar:

    def progress(num: int, total: int) -> None:
      bar.total = total
      bar.update(num - bar.n)

    statistics = dataset_statistics.read(dataset_dir, max_records, progress)
  return html_page.page(
    f"Data set {name}",
    _introduction(statistics),
    _counts(statistics),
    _charts(statistics),
    _regions(statistics),
    *([_labels(statistics)] if statistics.labels else []),
    _left_out(statistics),
    _crops(
      "Examples",
      "One frame from each of these evenly chosen tracks, beside the same "
      "frame with its regions in colour.",
      _evenly(statistics.tracks, NUM_CROPS),
    ),
    _crops(
      "Tracks of the lowest quality",
      "The worst track comes first.",
      sorted(statistics.tracks, key=lambda track: track.quality)[:NUM_WORST],
    ),
  )


# --- Numbers ------------------------------------------------------------------


def _introduction(statistics: Statistics) -> Html:
  total = sum(count["num_records"] for count in statistics.counts.values())
  if statistics.is_complete:
    return tag("p", f"All {counted(total, 'record')} were read for this page.")
  return tag(
    "p",
    "Counts are exact. Times, charts, regions and labels come from a sample of "
    f"whole videos, chosen by a hash of their names: "
    f"{statistics.num_records:,} of {total:,} records.",
  )


def _counts(statistics: Statistics) -> Html:
  rows = []
  for split, count in statistics.counts.items():
    rows.append(
      (
        split,
        *(f"{number:,}" for number in count.values()),
        _duration(statistics.secs(split)),
      )
    )
  statuses = [
    (status, f"{number:,}", html_page.share_bar(number / statistics.num_videos))
    for status, number in statistics.statuses.most_common()
  ]
  about = "" if statistics.is_complete else ", about"
  header = ("split", "videos", "tracks", "records", "frames", f"time{about}")
  return section(
    "Size",
    table(header, rows),
    tag("h3", "Videos by outcome"),
    table(("outcome", "videos", "share"), statuses),
  )


def _duration(secs: float) -> str:
  if np.isnan(secs):
    return "unknown"
  for unit, length in (("h", 3600), ("min", 60)):
    if secs >= length:
      return f"{secs / length:,.1f} {unit}"
  return f"{secs:.1f} s"


def _charts(statistics: Statistics) -> Html:
  tracks = statistics.tracks
  histogram = html_page.histogram
  secs = np.array([track.secs for track in tracks])
  sides = np.array([track.side for track in tracks])
  charts = [
    histogram("Length of a track", secs, " s"),
    histogram("Crop side in the source", sides, " px", None, _FULL_SIZE),
    histogram(
      "Quality of a track", [t.quality for t in tracks], limits=(0.0, 1.0)
    ),
  ]
  terms = np.array([track.quality_terms for track in tracks])
  for name, values in zip(schema.QUALITY_TERMS, terms.T, strict=True):
    known = values[~np.isnan(values)]
    if len(known):
      charts.append(histogram(f"Quality: {name}", known, limits=(0.0, 1.0)))
  enlarged = np.mean(sides < _FULL_SIZE)
  rates = Counter(
    "pictures" if track.is_picture else f"{track.fps:.4g}" for track in tracks
  )
  return section(
    "Tracks",
    tag(
      "p",
      f"{counted(len(tracks), 'track')}. {html_page.percent(enlarged)} of the "
      f"crops are smaller than {_FULL_SIZE:.0f}x{_FULL_SIZE:.0f} pixels in the "
      "source (left of the dashed line); prepare enlarged them.",
    ),
    tag("div", *charts, class_="charts"),
    tag("h3", "Frames per second of the source"),
    table(("rate", "tracks", "share"), _share_rows(rates)),
  )


def _regions(statistics: Statistics) -> Html:
  rows = []
  for code, name in enumerate(schema.REGIONS):
    present = statistics.present[code] / statistics.num_frames
    colour = region_pictures.COLOURS[code]
    name = tag(
      "span",
      html_page.swatch(colour),
      name.replace("_", " "),
      style="white-space:nowrap",
    )
    rows.append(
      (
        name,
        html_page.share_bar(present),
        html_page.share_bar(statistics.area[code]),
      )
    )
  header = ("region", "frames that show it", "mean share of the crop")
  return section("Face regions", table(header, rows))


def _labels(statistics: Statistics) -> Html:
  labels_of = {track.video_id: track.labels for track in statistics.tracks}
  num_videos = counted(len(labels_of), "video")
  parts = [tag("p", f"Labels of {num_videos}, one value per video.")]
  for name, label in statistics.labels.items():
    values = np.array([labels[name] for labels in labels_of.values()])
    parts += [tag("h3", f"{name} ({label.kind})"), _label(label, values)]
  return section("Labels", *parts)


def _label(label: Label, values: np.ndarray) -> Html:
  """Returns a table or charts of one label's values, float (N, K)."""
  if label.kind == listing.CLASS:
    counts = Counter(
      "unknown" if np.isnan(value) else label.names[int(value)]
      for value in values[:, 0]
    )
    return table(("class", "videos", "share"), _share_rows(counts))
  if label.kind == listing.BINARY:
    rows = []
    for name, column in zip(label.names, values.T, strict=True):
      known = column[~np.isnan(column)]
      yes = int((known == 1).sum())
      share = html_page.share_bar(yes / len(known)) if len(known) else "-"
      unknown = len(column) - len(known)
      rows.append((name, f"{yes:,}", f"{len(known) - yes:,}", unknown, share))
    header = ("attribute", "yes", "no", "unknown", "share of yes")
    return table(header, rows)
  charts = []
  for name, column in zip(label.names, values.T, strict=True):
    known = column[~np.isnan(column)]
    title = f"{name}: {len(column) - len(known)} unknown"
    if len(known):
      charts.append(html_page.histogram(title, known))
    else:
      charts.append(tag("p", title))
  return tag("div", *charts, class_="charts")


def _share_rows(counts: Counter[str]) -> list[tuple]:
  """Returns rows of name, number and share, the most common first."""
  total = max(counts.total(), 1)
  rows = counts.most_common(MAX_ROWS)
  rest = total - sum(number for _, number in rows)
  if len(counts) > MAX_ROWS:
    rows.append((f"{len(counts) - MAX_ROWS} others", rest))
  return [
    (name, f"{number:,}", html_page.share_bar(number / total))
    for name, number in rows
  ]


# --- Left-out videos ----------------------------------------------------------


def _left_out(statistics: Statistics) -> Html:
  title = "Left-out videos"
  if not statistics.left_out:
    return section(title, tag("p", "None: every video has a face track."))
  groups: dict[str, list[tuple[str, str]]] = {}
  for video_id, reason in statistics.left_out:
    groups.setdefault(re.sub(r"\d+", "0", reason), []).append(
      (video_id, reason)
    )
  by_size = sorted(groups.values(), key=len, reverse=True)
  rows = []
  for videos in by_size[:MAX_ROWS]:
    examples = [tag("li", file_name(name)) for name, _ in videos[:MAX_EXAMPLES]]
    rows.append(
      (
        tag("div", videos[0][1], tag("ul", *examples, class_="quiet")),
        f"{len(videos):,}",
        html_page.share_bar(len(videos) / statistics.num_videos),
      )
    )
  rest = by_size[MAX_ROWS:]
  if rest:
    number = sum(map(len, rest))
    share = html_page.share_bar(number / statistics.num_videos)
    rows.append((f"{len(rest)} other reasons", f"{number:,}", share))
  header = ("reason and example videos", "videos", "share of all")
  return section(
    title,
    tag(
      "p",
      "Reasons that differ only in numbers are counted together, under the "
      "first of them. quarantine.jsonl lists every video.",
    ),
    table(header, rows),
  )


# --- Pictures -----------------------------------------------------------------


def _crops(title: str, text: str, tracks: list[Track]) -> Html:
  return section(
    title,
    tag("p", text),
    _legend(),
    tag("div", *map(_crop, tracks), class_="crops"),
  )


def _evenly(tracks: list[Track], num: int) -> list[Track]:
  if len(tracks) <= num:
    return tracks
  places = (np.arange(num) + 0.5) * len(tracks) / num
  return [tracks[int(place)] for place in places]


def _crop(track: Track) -> Html:
  """Returns the middle frame of a track, plain and with its regions."""
  frame = dataset_statistics.read_frame(track.places[len(track.places) // 2])
  tinted = region_pictures.overlay(frame.pixels, frame.labels)
  pair = np.concatenate([frame.pixels, tinted], axis=1)
  terms = ", ".join(
    f"{name} {value:.2f}"
    for name, value in zip(
      schema.QUALITY_TERMS, track.quality_terms, strict=True
    )
    if not np.isnan(value)
  )
  length = "picture" if track.is_picture else f"{track.secs:.3g} s"
  numbers = (
    f"track {track.track_id}, {length}, {track.side:.0f} px, "
    f"quality {track.quality:.2f} ({terms})"
  )
  caption = tag("span", file_name(track.video_id), tag("br"), numbers)
  return html_page.picture(
    pair, caption, "face crop, plain and with its regions"
  )


def _legend() -> Html:
  items = [
    tag("span", html_page.swatch(colour), name.replace("_", " "))
    for name, colour in zip(
      schema.REGIONS[1:], region_pictures.COLOURS[1:], strict=True
    )
  ]
  return tag("div", *items, class_="legend")


# --- Command line -------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
  parser = cli.ArgumentParser(
    "data_prep.report",
    "Describes a prepared data set on one HTML page: counts, "
    "lengths, sizes, quality, regions, labels, left-out videos and crops.",
  )
  parser.add_argument(
    "dataset_dir",
    type=storage.path_argument,
    help="folder written by data_prep.prepare, also gs://: the shards that "
    "hold the sample are downloaded",
  )
  parser.add_argument(
    "--output",
    type=cli.output_file(".html", ".htm"),
    required=True,
    help="page to write (.html)",
  )
  parser.add_argument(
    "--max_records",
    type=cli.at_least(1),
    default=2000,
    help="records to read; whole videos are read, so it may be a few more",
  )
  return parser


if __name__ == "__main__":
  sys.exit(main())
