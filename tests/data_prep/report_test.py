"""The page describes the data set and runs nothing from file names."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from data_prep import report
from data_prep.inspection import dataset_statistics
from data_prep.inspection.dataset_statistics import InspectionError
from data_prep.output import shards
from marlin_jax.records import html_page
from tests.support import made_dataset
from tests.support.made_dataset import a_record, some_labels
from tests.support.processes import ROOT

EVIL = "<script>alert(1)</script> \"'&amp; \u202e.mp4"
REFUSED = {
  "x.mp4": "decoder reported damage after 3 frames",
  "y.mp4": "decoder reported damage after 12 frames",
  "z.mp4": "<img src=x onerror=alert(1)>",
  "<b>w</b>.mp4": "no face found",
}


class Page(HTMLParser):
  """A page as parsed by a browser."""

  def __init__(self, text: str) -> None:
    super().__init__()
    self.tags: list[tuple[str, dict[str, str]]] = []
    self.open: list[str] = []
    self.text = ""
    self.feed(text)
    assert self.open == []

  def handle_starttag(self, name, attributes):
    self.tags.append((name, dict(attributes)))
    if name not in ("meta", "img", "br"):
      self.open.append(name)

  def handle_startendtag(self, name, attributes):
    self.tags.append((name, dict(attributes)))

  def handle_endtag(self, name):
    assert self.open.pop() == name

  def handle_data(self, data):
    if "style" not in self.open:
      self.text += f"{data}\n"

  def row(self, first: str) -> list[str]:
    """Returns the texts after the cell `first`."""
    lines = [line.strip() for line in self.text.splitlines()]
    return lines[lines.index(first) + 1 :]


def page(path: Path, max_records: int = 1000) -> Page:
  return Page(report.make(path, max_records))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
  videos = {
    "a.mp4": [
      a_record("a.mp4", 0, 0, 5, side=100.0, labels=some_labels(1, 1, 0.5)),
      a_record("a.mp4", 1, 0, 5, side=300.0, labels=some_labels(1, 1, 0.5)),
    ],
    "b.mp4": [
      a_record("b.mp4", 0, 0, 5, quality=0.1, labels=some_labels(0, 1, -3))
    ],
    EVIL: [a_record(EVIL, 0, 0, 10, labels=some_labels(0, np.nan, -3))],
  }
  path = tmp_path_factory.mktemp("made") / "<i>faces"
  return made_dataset.make(
    path, videos, {"b.mp4": "val"}, REFUSED, None, made_dataset.LABELS
  )


def test_counts_of_each_split_are_those_of_the_data_set(dataset):
  found = page(dataset)
  assert "All 4 records were read for this page." in found.text
  # Videos, tracks, records, frames, and 25 frames per second.
  assert found.row("train")[:5] == ["2", "3", "3", "20", "0.8 s"]
  assert found.row("val")[:5] == ["1", "1", "1", "5", "0.2 s"]
  assert found.row("kept")[:2] == ["3", "43%"]
  assert found.row("quarantined")[:2] == ["4", "57%"]


def test_sizes_rates_and_qualities_are_charts_with_their_numbers(dataset):
  found = page(dataset)
  charts = {
    attributes["aria-label"].split(":")[0]: attributes["aria-label"]
    for name, attributes in found.tags
    if name == "svg"
  }
  assert "all from 100 to 300" in charts["Crop side in the source"]
  assert "all from 0.2 to 0.4" in charts["Length of a track"]
  assert "all from 0.1 to 0.5" in charts["Quality of a track"]
  labels = [a.get("aria-label", "") for _, a in found.tags]
  for name, value in zip(
    ("size", "sharpness", "pose", "landmarks"), (0.5, 0.8, 0.9, 1), strict=True
  ):
    assert f"Quality: {name}: {value:.3g}, all of 4" in labels
  assert "25% of the crops are smaller than 224x224" in found.text
  assert found.row("25")[:2] == ["4", "100%"]


def test_region_statistics_are_those_of_the_label_maps(dataset):
  found = page(dataset)
  pixels = 224 * 224
  nose, face = 30 * 20, 140 * 100
  for name, share in (
    ("nose", nose / pixels),
    ("skin", (face - nose) / pixels),
    ("background", 1 - face / pixels),
  ):
    expected = ["100%", html_page.percent(share)]
    assert found.row(name)[:2] == expected
  assert found.row("hair")[:2] == ["0%", "0%"]


def test_labels_are_counted_by_their_kind(dataset):
  found = page(dataset)
  assert "3 videos, one value per video" in found.text
  # Yes, no, unknown, share of yes.
  assert found.row("smiling")[:4] == ["1", "2", "0", "33%"]
  assert found.row("eyeglasses")[:4] == ["0", "0", "3", "-"]
  assert found.row("happy")[:2] == ["2", "67%"]
  assert "sentiment: 0 unknown" in found.text


def test_reasons_that_differ_in_numbers_are_counted_together(dataset):
  found = page(dataset)
  rows = found.row("decoder reported damage after 3 frames")
  assert [line for line in rows if line][:3] == ["x.mp4", "y.mp4", "2"]
  assert "after 12 frames" not in found.text


def test_names_from_outside_are_text_and_nothing_else(dataset):
  found = page(dataset)
  assert EVIL in found.text
  assert "<b>w</b>.mp4" in found.text
  assert "<img src=x onerror=alert(1)>" in found.text
  assert "<i>faces" in found.text
  names = {name for name, _ in found.tags}
  assert not names & {"script", "b", "iframe", "object", "link", "base"}
  for name, attributes in found.tags:
    assert not [key for key in attributes if key.startswith("on")]
    if name == "img":
      assert attributes["src"].startswith("data:image/jpeg;base64,")
    assert "href" not in attributes
  # A name that changes the direction of text changes only its own.
  assert ("bdi", {"class": "name"}) in found.tags
  policy = [a for _, a in found.tags if "http-equiv" in a]
  assert "default-src 'none'" in policy[0]["content"]


def test_page_needs_nothing_from_elsewhere(dataset):
  text = report.make(dataset, 1000)
  for foreign in ("http://", "https://", "url(", "@import", 'src="/'):
    assert foreign not in text


def test_crops_are_shown_once_a_track_and_the_worst_first(dataset):
  found = page(dataset)
  pictures = [a for name, a in found.tags if name == "img"]
  assert len(pictures) == 2 * 4
  worst = found.row("Tracks of the lowest quality")
  assert next(line for line in worst if line.endswith(".mp4")) == "b.mp4"


def test_large_data_set_is_sampled_and_the_page_says_so(tmp_path):
  videos = {
    f"{i:03d}.mp4": [a_record(f"{i:03d}.mp4", num_frames=2)] for i in range(60)
  }
  path = made_dataset.make(
    tmp_path / "dataset", videos, {"003.mp4": "val"}, num_shards=2
  )
  found = dataset_statistics.read(path, max_records=10)
  assert found.num_records == 10
  assert len({track.video_id for track in found.tracks}) == 10
  # Each split is sampled, and its time is that of all its frames.
  assert {track.split for track in found.tracks} == {"train", "val"}
  assert found.secs("train") == pytest.approx(59 * 2 / 25)
  text = page(path, 10).text
  assert "10 of 60 records" in text
  assert "time, about" in text


def test_sampled_records_are_those_of_their_videos(dataset):
  found = dataset_statistics.read(dataset, 1000)
  assert len(found.tracks) == 4
  for track in found.tracks:
    for place in track.places:
      record = dataset_statistics.read_frame(place).record
      assert record.video_id == track.video_id
      assert record.track_id == track.track_id


def test_nothing_left_out_and_no_labels_are_fine(tmp_path):
  path = made_dataset.make(tmp_path / "d", {"a.mp4": [a_record("a.mp4")]})
  found = page(path)
  assert "None: every video has a face track." in found.text
  assert "Labels" not in found.text


def test_sample_data_set_has_its_page(sample_dataset, tmp_path):
  output = tmp_path / "new" / "report.html"
  result = subprocess.run(
    [sys.executable, "-m", "data_prep.report", str(sample_dataset)]
    + ["--output", str(output)],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )
  assert result.returncode == 0, result.stderr
  assert str(output) in result.stdout
  found = Page(output.read_text(encoding="utf-8"))
  assert found.row("train")[:4] == ["1", "1", "2", "120"]
  rows = [line for line in found.row("no face found") if line]
  assert rows[:3] == ["bigbuckbunny.mp4", "bikes.mp4", "2"]
  assert "carphone_pristine.mp4" in found.text


def test_page_does_not_replace_a_file_of_the_data_set(tmp_path, capsys):
  output = tmp_path / "videos.jsonl"
  with pytest.raises(SystemExit):
    report.main([str(tmp_path), "--output", str(output)])
  assert "does not end with .html" in capsys.readouterr().err


def test_folder_without_a_data_set_is_an_error(tmp_path, capsys):
  output = tmp_path / "a.html"
  assert report.main([str(tmp_path), "--output", str(output)]) == 1
  assert str(tmp_path) in capsys.readouterr().err
  assert not output.exists()


def test_damaged_shard_is_named_and_verify_recommended(tmp_path):
  path = made_dataset.make(tmp_path / "d", {"a.mp4": [a_record("a.mp4")]})
  (shard,) = path.glob("*.array_record-*")
  data = shard.read_bytes()
  shard.write_bytes(data[: len(data) // 2])
  with pytest.raises(InspectionError, match=f"{shard.name}.*data_prep.verify"):
    report.make(path, 10)
  writer = ArrayRecordWriter(str(shard), shards.WRITER_OPTIONS)
  writer.write(b"something else")
  writer.close()
  with pytest.raises(InspectionError, match=f"{shard.name}.*data_prep.verify"):
    report.make(path, 10)


def test_histogram_counts_every_number_once():
  np_rng = np.random.default_rng(0)
  for values in (np_rng.normal(size=500), np.zeros(3), 1e6 * np_rng.random(9)):
    found = Page(html_page.histogram("Numbers", values, " m"))
    counts = [
      int(line.rpartition(": ")[2])
      for line in found.text.splitlines()
      if " m: " in line
    ]
    assert sum(counts) == len(values)
    assert len(counts) <= 30
