"""Faults of untrusted manifests, paths and weights.

Other tests cover:
  paths that leave the root, addresses, control characters: manifest_test
    (`test_unsafe_rows_...`, `test_links_...`, `test_path_over_two_lines_...`),
    prepare_test (`test_bad_input_...`); names that look like patterns and
    addresses, playlists: decode_test. Here: a run over such names
  spaces, commas, unicode, equal stems, wrong columns, CRLF, empty files:
    manifest_test
  malicious pickles: formats_test (`test_a_malicious_pickle_...`). Here: no
    other way to a pickle
  downloads: assets_test (hash, two at once, half a file). Here: published
    weights
  identities, order of folders: manifest_test (Splits), prepare_test
    (`test_killed_runs_worker_count_and_folder_order_...`)
"""

import ast
import http.server
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from data_prep import report, verify
from data_prep.sources import manifest
from marlin_jax.inference import feature_folder
from marlin_jax.weights import formats
from marlin_jax.weights.weights import WeightsError
from tests.support.processes import ROOT, run_prepare

# Valid file names that mean something else to a shell, a browser, a format
# string or a command line.
NAMES = (
  "--help.mp4",
  "-.mp4",
  "$(touch was_here).mp4",
  "`touch was_here`;'\".mp4",
  "%03d %s {0} {name}.mp4",
  "<script>alert(1)<!--.mp4",
  "concat:a|b.mp4",
  "ü 顔 \U0001f600.mp4",
  " leading and trailing .mp4",
  "a" * 251 + ".mp4",
  "deep/" * 20 + "v.mp4",
)


@pytest.mark.skipif(sys.platform != "linux", reason="names that others refuse")
def test_run_over_odd_names_keeps_all_and_runs_nothing(
  carphone, face_models, tmp_path, capsys
):
  folder = tmp_path / "videos"
  video = carphone(tmp_path / "v.mp4", 1)
  for name in NAMES:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(video, folder / name)
  output = tmp_path / "dataset"
  result = run_prepare("--input", folder, "--output", output)
  assert result.returncode == 0, result.stderr
  assert f"{len(NAMES)} videos" in result.stdout
  assert (output / "quarantine.jsonl").read_text() == ""
  found = verify.verify(output, num_workers=1)
  assert found["is_whole"], found["problems"]
  assert found["num_videos"] == len(NAMES)
  page = report.make(output, max_records=1000)
  assert "<script" not in page
  assert "&lt;script&gt;alert(1)&lt;!--.mp4" in page
  assert not list(Path.cwd().glob("was_here*"))
  assert not list(tmp_path.rglob("was_here*"))


def test_names_that_are_not_unicode_are_listed_and_nothing_is_made(tmp_path):
  folder = tmp_path / "videos"
  folder.mkdir()
  try:
    Path(folder, b"caf\xe9.mp4".decode(errors="surrogateescape")).touch()
  except OSError:
    pytest.skip("this file system refuses such names")
  result = run_prepare("--input", folder, "--output", tmp_path / "out")
  assert result.returncode == 1
  assert r"'caf\udce9.mp4' contains a control character or invalid UTF-8" in (
    result.stderr
  )
  assert not (tmp_path / "out").exists()


def test_devices_behind_links_are_not_opened(tmp_path):
  (tmp_path / "zero.mp4").symlink_to("/dev/zero")
  with pytest.raises(manifest.ManifestError, match="leads out of the root"):
    manifest.read_sources(tmp_path)


# --- Pickles ------------------------------------------------------------------

# Modules and functions that can execute the content of a file.
FORBIDDEN = {
  "pickle",
  "cPickle",
  "dill",
  "joblib",
  "marshal",
  "shelve",
  "os.system",
  "os.popen",
  "eval",
  "exec",
}


def name_of(node: ast.expr) -> str:
  """Returns the dotted name of an expression, '' if it is not a name."""
  if isinstance(node, ast.Name):
    return node.id
  if isinstance(node, ast.Attribute):
    return f"{name_of(node.value)}.{node.attr}"
  return ""


def test_nothing_here_runs_what_a_file_says():
  num_loads = 0
  for package in ("marlin_jax", "data_prep", "configs"):
    for path in (ROOT / package).rglob("*.py"):
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
          names = [alias.name for alias in node.names]
          names.append(getattr(node, "module", None) or "")
          assert not FORBIDDEN & set(names), path
        if not isinstance(node, ast.Call):
          continue
        name = name_of(node.func)
        arguments = {
          k.arg: k.value.value
          for k in node.keywords
          if isinstance(k.value, ast.Constant)
        }
        assert name not in FORBIDDEN, f"{path}: {name}"
        assert not arguments.get("allow_pickle"), path
        assert not arguments.get("shell"), path
        assert not arguments.get("trust_remote_code"), path
        if name == "torch.load":
          num_loads += 1
          assert arguments.get("weights_only") is True, path
        if name.startswith("yaml."):
          assert name == "yaml.safe_load", path
  assert num_loads  # the search finds what it looks for


class Malicious:
  def __reduce__(self):
    return Path.touch, (Path("was_here"),)


def test_pickle_within_arrays_is_refused(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  np.savez("a.npz", metadata=np.array([Malicious()], object))
  with pytest.raises(ValueError, match="allow_pickle"):
    feature_folder.read_metadata(Path("a.npz"))
  assert not Path("was_here").exists()


# --- Downloads ----------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
  """Server that announces 1000 bytes and sends 400 at the first request."""

  num_asked = 0

  def do_GET(self):
    type(self).num_asked += 1
    is_first = self.num_asked == 1
    self.send_response(200)
    self.send_header("Content-Length", "1000")
    self.end_headers()
    self.wfile.write(bytes(400 if is_first else 1000))

  def log_message(self, *_):
    pass


def test_download_of_weights_that_breaks_off_leaves_nothing_behind(
  tmp_path, monkeypatch
):
  monkeypatch.setenv("MARLIN_HOME", str(tmp_path))
  Server.num_asked = 0
  with http.server.HTTPServer(("127.0.0.1", 0), Server) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
      address = f"http://127.0.0.1:{server.server_port}/"
      monkeypatch.setattr(formats, "_ADDRESS", address)
      with pytest.raises(WeightsError, match="400 of 1000 bytes"):
        formats.resolve("marlin_vit_base_ytf")
      assert list((tmp_path / "models").iterdir()) == []
      path = formats.resolve("marlin_vit_base_ytf")
      assert path.read_bytes() == bytes(1000)
      assert list((tmp_path / "models").iterdir()) == [path]
    finally:
      server.shutdown()
      thread.join()
