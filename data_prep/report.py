"""Describes a prepared data set on one HTML page that can be sent around.

  python -m data_prep.report DATASET_DIR --output report.html

Counts are exact; charts come from all records of a small data set, and from a
sample of a large one, which the page then says.
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
from data_prep.inspection import html_page
from data_prep.inspection.html_page import Html, file_name, section, table, tag
from data_prep.sources import listing
from marlin_jax.records import cli, schema
from marlin_jax.records.cli import counted

if TYPE_CHECKING:
  from data_prep.inspection.dataset_statistics import Statistics, Track
  from data_prep.sources.listing import Label

# Crops on the page, some 15 kB each.
NUM_CROPS = 24
NUM_WORST = 12
# Rows of a table; what is left is counted in its last one.
MAX_ROWS = 30
MAX_EXAMPLES = 3
# A crop of fewer pixels was enlarged.
_ENLARGED = float(schema.FRAME_SIZE)


def main(argv: Sequence[str] | None = None) -> int:
  """Returns the exit code: 0, 1 for an error, 130 when interrupted."""
  args = _parser().parse_args(argv)

  def work() -> None:
    text = make(args.dataset_dir, args.max_records)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(text, encoding="utf-8")
    print(f"{args.output}: {len(text) / 1e6:.1f} MB, for any browser")

  return cli.run_command(work, interrupted="No page was written.")


def make(dataset_dir: Path, max_records: int) -> str:
  """Returns the page.

  Args:
    dataset_dir: a folder that data_prep.prepare wrote.
    max_records: at least so many records are read, if there are so many.

  Raises:
    DatasetError: there is no such data set, or it is damaged.
  """
  from tqdm import tqdm

  from data_prep.inspection import dataset_statistics

  with tqdm(desc="reading", unit=" records") as bar:

    def progress(num: int, total: int) -> None:
      bar.total = total
      bar.update(num - bar.n)

    found = dataset_statistics.read(dataset_dir, max_records, progress)
  return html_page.page(
    f"Data set {dataset_dir.resolve().name}",
    _introduction(found),
    _counts(found),
    _charts(found),
    _regions(found),
    *([_labels(found)] if found.labels else []),
    _refused(found),
    _crops(
      "What the records show",
      "One frame of each of these tracks, evenly chosen, beside the same frame "
      "with its regions in colour.",
      _evenly(found.tracks, NUM_CROPS),
    ),
    _crops(
      "The worst tracks",
      "Those of the lowest quality, the worst first.",
      sorted(found.tracks, key=lambda track: track.quality)[:NUM_WORST],
    ),
  )


# --- Numbers ------------------------------------------------------------------


def _introduction(found: Statistics) -> Html:
  total = sum(count["num_records"] for count in found.counts.values())
  if found.is_complete:
    return tag("p", f"All {counted(total, 'record')} were read for this page.")
  return tag(
    "p",
    f"Counts are exact. Times, charts, regions and labels come from a sample: "
    f"{found.num_records:,} of {total:,} records, the whole videos they belong "
    "to, chosen by a hash of their names.",
  )


def _counts(found: Statistics) -> Html:
  rows = []
  for split, count in found.counts.items():
    rows.append(
      (
        split,
        *(f"{number:,}" for number in count.values()),
        _duration(found.secs(split)),
      )
    )
  statuses = [
    (status, f"{number:,}", html_page.share_bar(number / found.num_videos))
    for status, number in found.statuses.most_common()
  ]
  about = "" if found.is_complete else ", about"
  header = ("split", "videos", "tracks", "records", "frames", f"time{about}")
  return section(
    "How much there is",
    table(header, rows),
    tag("h3", "What became of the videos"),
    table(("outcome", "videos", "share"), statuses),
  )


def _duration(secs: float) -> str:
  if np.isnan(secs):
    return "not known"
  for unit, length in (("h", 3600), ("min", 60)):
    if secs >= length:
      return f"{secs / length:,.1f} {unit}"
  return f"{secs:.1f} s"


def _charts(found: Statistics) -> Html:
  tracks = found.tracks
  histogram = html_page.histogram
  secs = np.array([track.secs for track in tracks])
  sides = np.array([track.side for track in tracks])
  charts = [
    histogram("Length of a track", secs, " s"),
    histogram("Crop side in the source", sides, " px", None, _ENLARGED),
    histogram(
      "Quality of a track", [t.quality for t in tracks], limits=(0.0, 1.0)
    ),
  ]
  terms = np.array([track.quality_terms for track in tracks])
  for name, values in zip(schema.QUALITY_TERMS, terms.T, strict=True):
    known = values[~np.isnan(values)]
    if len(known):
      charts.append(histogram(f"Quality: {name}", known, limits=(0.0, 1.0)))
  enlarged = np.mean(sides < _ENLARGED)
  rates = Counter(f"{track.fps:.4g}" for track in tracks)
  return section(
    "Tracks",
    tag(
      "p",
      f"{counted(len(tracks), 'track')}. Of their crops, "
      f"{html_page.percent(enlarged)} had fewer than {_ENLARGED:.0f} pixels a "
      "side in the source (left of the dashed line) and were enlarged.",
    ),
    tag("div", *charts, class_="charts"),
    tag("h3", "Frames per second of the source"),
    table(("rate", "tracks", "share"), _share_rows(rates)),
  )


def _regions(found: Statistics) -> Html:
  from data_prep import contact_sheet

  rows = []
  for code, name in enumerate(schema.REGIONS):
    present = found.present[code] / found.num_frames
    colour = contact_sheet.COLOURS[code]
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
        html_page.share_bar(found.area[code]),
      )
    )
  header = ("region", "frames that show it", "mean share of the crop")
  return section("Face regions", table(header, rows))


def _labels(found: Statistics) -> Html:
  of_video = {track.video_id: track.labels for track in found.tracks}
  parts = [
    tag("p", f"Of {counted(len(of_video), 'video')}, one value a video.")
  ]
  for name, label in found.labels.items():
    values = np.array([labels[name] for labels in of_video.values()])
    parts += [tag("h3", f"{name} ({label.kind})"), _label(label, values)]
  return section("Labels", *parts)


def _label(label: Label, values: np.ndarray) -> Html:
  """Shows float (N, K), the values of one label."""
  if label.kind == listing.CLASS:
    counts = Counter(
      "not known" if np.isnan(value) else label.names[int(value)]
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
    header = ("attribute", "yes", "no", "not known", "yes of those known")
    return table(header, rows)
  charts = []
  for name, column in zip(label.names, values.T, strict=True):
    known = column[~np.isnan(column)]
    title = f"{name}: {len(column) - len(known)} not known"
    if len(known):
      charts.append(html_page.histogram(title, known))
    else:
      charts.append(tag("p", title))
  return tag("div", *charts, class_="charts")


def _share_rows(counts: Counter[str]) -> list[tuple]:
  """Rows of name, number and share, the commonest first."""
  total = max(counts.total(), 1)
  rows = counts.most_common(MAX_ROWS)
  rest = total - sum(number for _, number in rows)
  if len(counts) > MAX_ROWS:
    rows.append((f"{len(counts) - MAX_ROWS} others", rest))
  return [
    (name, f"{number:,}", html_page.share_bar(number / total))
    for name, number in rows
  ]


# --- What was left out --------------------------------------------------------


def _refused(found: Statistics) -> Html:
  title = "What was left out, and why"
  if not found.refused:
    return section(title, tag("p", "Nothing: every video gave a track."))
  groups: dict[str, list[tuple[str, str]]] = {}
  for video_id, reason in found.refused:
    groups.setdefault(re.sub(r"\d+", "0", reason), []).append(
      (video_id, reason)
    )
  commonest = sorted(groups.values(), key=len, reverse=True)
  rows = []
  for videos in commonest[:MAX_ROWS]:
    examples = [tag("li", file_name(name)) for name, _ in videos[:MAX_EXAMPLES]]
    rows.append(
      (
        tag("div", videos[0][1], tag("ul", *examples, class_="quiet")),
        f"{len(videos):,}",
        html_page.share_bar(len(videos) / found.num_videos),
      )
    )
  rest = commonest[MAX_ROWS:]
  if rest:
    number = sum(map(len, rest))
    share = html_page.share_bar(number / found.num_videos)
    rows.append((f"{len(rest)} other reasons", f"{number:,}", share))
  header = ("reason, and some of the videos", "videos", "share of all")
  return section(
    title,
    tag(
      "p",
      "Reasons that differ in numbers only are counted together, by the first "
      "of them; quarantine.jsonl names every video.",
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
  """Draws the middle frame of a track."""
  from data_prep import contact_sheet
  from data_prep.inspection import dataset_statistics

  place = track.places[len(track.places) // 2]
  record = dataset_statistics.read_record(place)
  middle = len(record) // 2
  try:
    frame = schema.decode_frames(record, [middle])[0]
    labels = schema.decode_parsing(record)[middle]
  except ValueError as e:
    raise dataset_statistics.DatasetError(
      f"{place.shard} record {place.number}: {e}"
    ) from e
  pair = np.concatenate([frame, contact_sheet.overlay(frame, labels)], axis=1)
  terms = ", ".join(
    f"{name} {value:.2f}"
    for name, value in zip(
      schema.QUALITY_TERMS, track.quality_terms, strict=True
    )
    if not np.isnan(value)
  )
  numbers = (
    f"track {track.track_id}, {track.secs:.3g} s, {track.side:.0f} px, "
    f"quality {track.quality:.2f} ({terms})"
  )
  caption = tag("span", file_name(track.video_id), tag("br"), numbers)
  return html_page.picture(pair, caption)


def _legend() -> Html:
  from data_prep import contact_sheet

  items = [
    tag("span", html_page.swatch(colour), name.replace("_", " "))
    for name, colour in zip(
      schema.REGIONS[1:], contact_sheet.COLOURS[1:], strict=True
    )
  ]
  return tag("div", *items, class_="legend")


# --- Command line -------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m data_prep.report",
    description="Describes a prepared data set on one HTML page: counts, "
    "lengths, sizes, quality, regions, labels, what was left out, and crops.",
    formatter_class=cli.HelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    "dataset_dir",
    type=storage.disk_path,
    help="folder on a disk that data_prep.prepare wrote",
  )
  parser.add_argument(
    "--output", type=Path, required=True, help="page to write (.html)"
  )
  parser.add_argument(
    "--max_records",
    type=cli.at_least(1),
    default=2000,
    help="records to read, or a few more: whole videos are",
  )
  return parser


if __name__ == "__main__":
  sys.exit(main())
