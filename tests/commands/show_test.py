"""The page of a run: curves, time, pictures, and nothing from elsewhere."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from marlin_jax import show
from marlin_jax.records import html_page

EVIL = "<script>alert(1)</script>"


class Page(HTMLParser):
  """Texts below each heading, and the elements of a page."""

  def __init__(self, text):
    super().__init__()
    self.elements, self.texts, self._heading = [], {}, ""
    self.feed(text.removeprefix("<!doctype html>\n"))

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))

  handle_startendtag = handle_starttag

  def handle_data(self, data):
    if self.elements[-1][0] in ("h1", "h2"):
      self._heading = data
    self.texts.setdefault(self._heading, []).append(data)

  def all(self, name):
    return [attrs for tag, attrs in self.elements if tag == name]


def rows():
  """Lines of a run of 40 steps."""
  for step in range(10, 41, 10):
    yield {
      "step": step,
      "train/loss_rec": 1 / step,
      "train/grad_norm": 2.0,
      "train/sync": 0.25,  # of another kind of run
      "time/clips_per_sec": 8.0,
      "goodput/step_secs": 30.0,
      "goodput/eval_secs": 10.0,
      "goodput/total_secs": 40.0,
      "goodput/down_secs": 7200.0,
      "time/unix_secs": 1e9,
    }
    yield {"step": step, "eval/probe/auc": step / 50, "eval/knn/auc": 0.5}
  yield {"step": 25, "event": "skipped", "ids": [EVIL]}
  yield {"step": 0, "event": "tracked", "id": "abc"}


@pytest.fixture
def workdir(tmp_path):
  path = tmp_path / "<b>run"
  (path / "pictures").mkdir(parents=True)
  with (path / "metrics.jsonl").open("w") as file:
    file.writelines(f"{json.dumps(row)}\n" for row in rows())
    file.write('{"step": 50, "train/lo')  # killed while writing
  config = {"data": {"path": EVIL}, "batch_size": 8, "num_epochs": 0.0}
  (path / "config.json").write_text(json.dumps(config))
  for step in range(1, 21):
    picture = np.full((30, 1000, 3), 10 * step, np.uint8)
    Image.fromarray(picture).save(path / "pictures" / f"step_{step:07d}.png")
  return path


def made(workdir):
  assert show.main([str(workdir)]) == 0
  return Page((workdir / "show.html").read_text())


def test_curves_time_and_pictures_are_on_the_page(workdir):
  page = made(workdir)
  assert page.texts["Run <b>run"]
  assert "train/loss_rec 0.025" in page.texts["Reconstruction"]
  assert "eval/probe/auc 0.8" in page.texts["Probes"]
  assert "eval/knn/auc 0.5" in page.texts["Probes"]
  assert "train/sync 0.25" in page.texts["Other metrics"]
  assert {"75%", "25%", "30.0 s"} <= set(page.texts["Time"])
  assert "2.0 h between them" in " ".join(page.texts["Time"])
  events = "".join(page.texts["Events"])
  assert "step 25: skipped" in events
  assert EVIL in events
  assert "tracked" not in events
  assert {"data.path", EVIL} <= set(page.texts["Configuration"])
  images = page.all("img")
  assert [image["alt"] for image in images][:2] == ["Step 20", "Step 18"]
  assert images[-1]["alt"] == "Step 1"
  assert {image["width"] for image in images} == {"900"}
  # A curve has a point per logged step.
  assert {len(p["points"].split()) for p in page.all("polyline")} == {4}


def test_the_page_needs_nothing_and_runs_nothing(workdir):
  page = made(workdir)
  assert not page.all("script")
  for _, attrs in page.elements:
    for name in ("src", "href"):
      assert attrs.get(name, "data:").startswith("data:")


def test_a_run_without_evaluations_has_its_page(workdir):
  (workdir / "metrics.jsonl").write_text('{"step": 1, "train/loss_rec": 0.5}\n')
  (workdir / "config.json").unlink()
  for path in (workdir / "pictures").iterdir():
    path.unlink()
  page = made(workdir)
  assert "train/loss_rec 0.5" in page.texts["Reconstruction"]
  assert not {"Probes", "Pictures", "Configuration"} & page.texts.keys()
  # A single point is a dot.
  assert len(page.all("circle")) == 1


def test_a_folder_without_a_run_is_refused(tmp_path, capsys):
  assert show.main([str(tmp_path)]) == 1
  assert "no metrics.jsonl" in capsys.readouterr().err
  (tmp_path / "metrics.jsonl").touch()
  assert show.main([str(tmp_path)]) == 1
  assert "no step has been logged" in capsys.readouterr().err
  (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n')
  assert show.main([str(tmp_path)]) == 1
  assert "was not written by a run" in capsys.readouterr().err
  assert not (tmp_path / "show.html").exists()
  assert show.main(["s3://bucket/run", "--output=x.html"]) == 1
  assert "s3://" in capsys.readouterr().err


def test_what_a_kill_cut_off_is_left_out(workdir):
  (workdir / "config.json").write_text('{"data": {"pa')
  picture = workdir / "pictures" / "step_0000020.png"
  picture.write_bytes(picture.read_bytes()[:60])
  page = made(workdir)
  assert "Configuration" not in page.texts
  assert [image["alt"] for image in page.all("img")][0] == "Step 18"


def points_of(*curves, **options):
  text = html_page.lines("Chart", curves, "step", **options)
  return [
    np.array([p.split(",") for p in found.split()], float)
    for found in re.findall(r'points="(.*?)"', text)
  ], [float(t.replace(",", "")) for t in re.findall(r'end">([\d.e+-]+)<', text)]


def test_curves_share_an_axis_that_holds_them():
  x = np.arange(1, 6)
  rising = html_page.Curve("a", x, x * 10.0)
  flat = html_page.Curve("b", x, np.full(5, 30.0))
  (a, b), ticks = points_of(rising, flat)
  assert (np.diff(a[:, 0]) > 0).all()
  # Down the page is less.
  assert (np.diff(a[:, 1]) < 0).all()
  assert a[2].tolist() == b[2].tolist()
  assert {10, 20, 30, 40} <= set(ticks)
  # Factors are distances of a logarithmic axis.
  powers = html_page.Curve("c", x, 10.0**x)
  ((c,), _) = points_of(powers, is_log=True)
  assert np.ptp(np.diff(c[:, 1])) < 0.2
  # One value has an axis too.
  ((d,), _) = points_of(html_page.Curve("d", x, np.zeros(5)))
  assert np.isfinite(d).all()


def test_a_long_curve_is_drawn_by_means():
  y = np.tile([0.0, 2.0], 5000)
  ((found,), _) = points_of(html_page.Curve("a", np.arange(10000), y))
  assert len(found) <= 320
  # A mean is far from both ends of the axis.
  assert np.ptp(found[:, 1]) < 10
