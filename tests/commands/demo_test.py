"""The demo as its visitors use it: in a browser, from upload to pictures."""

import contextlib
import importlib.util
import io
import os
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
import urllib.request
from typing import ClassVar

import av
import numpy as np
import pytest
from PIL import Image

from marlin_jax import Marlin, demo
from marlin_jax.weights import safetensors_folder
from tests.support import chromium
from tests.support.demo_models import make_classifier, make_weights
from tests.support.processes import ROOT
from tests.support.videos import moving_noise, write_video

NAMES = ("calm", "glad", "sad")
PICTURES = ("crop", "seen", "made", "heat")
WAIT_SECS = 240


def test_without_a_checkpoint_it_says_which(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert demo.main([]) == 1
  message = capsys.readouterr().err
  assert "runs/quickstart" in message
  assert "make quickstart" in message
  assert demo.main(["--checkpoint", str(tmp_path / "nowhere")]) == 1
  assert "nowhere" in capsys.readouterr().err


def test_a_port_that_is_none_is_refused(capsys):
  with pytest.raises(SystemExit):
    demo.main(["--port=99999"])
  assert "99999 is more than 65535" in capsys.readouterr().err


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


@contextlib.contextmanager
def served(log, *args, **environment):
  """Runs the demo; yields its address and process."""
  with log.open("w") as file:
    process = subprocess.Popen(
      [sys.executable, "-m", "marlin_jax.demo", *map(str, args)],
      stdout=file,
      stderr=subprocess.STDOUT,
      cwd=ROOT,
      env=os.environ | environment,
    )
  try:
    deadline = time.monotonic() + WAIT_SECS
    while not (found := re.search(r"http://\S+", log.read_text())):
      assert process.poll() is None, log.read_text()
      assert time.monotonic() < deadline, log.read_text()
      time.sleep(0.2)
    yield found[0], process
  finally:
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
  path = tmp_path_factory.mktemp("weights")
  safetensors_folder.write(make_weights(), path / "mae")
  make_classifier(path, NAMES)
  return path


class Proxy(socketserver.BaseRequestHandler):
  """Refuses requests to other hosts, and keeps their first lines."""

  lines: ClassVar[list[bytes]] = []

  def handle(self):
    self.lines.append(self.request.recv(1000).partition(b"\r\n")[0])


@pytest.fixture(scope="module")
def proxy():
  with socketserver.TCPServer(("127.0.0.1", 0), Proxy) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


@pytest.fixture(scope="module")
def page(face_models, weights, proxy, carphone_frames, tmp_path_factory):
  """The demo, opened in a browser."""
  if importlib.util.find_spec("gradio") is None:
    pytest.skip("needs the package gradio")
  folder = tmp_path_factory.mktemp("page")
  (folder / "tmp").mkdir()
  camera = write_video(
    folder / "camera.mjpeg", carphone_frames, "mjpeg", "yuvj420p"
  )
  address = f"http://127.0.0.1:{proxy.server_address[1]}"
  with (
    chromium.browser(folder / "profile", camera=camera) as chrome,
    served(
      folder / "log",
      *("--checkpoint", weights / "mae", "--model", weights / "model"),
      *("--port", free_port()),
      TMPDIR=str(folder / "tmp"),
      HTTP_PROXY=address,
      HTTPS_PROXY=address,
      NO_PROXY="127.0.0.1,localhost",
    ) as (url, process),
  ):
    chrome.get(url)
    yield chrome, folder, process


def upload(chrome, path) -> None:
  from selenium.webdriver.common.by import By

  chrome.refresh()
  wait_for(
    lambda: chrome.find_elements(By.CSS_SELECTOR, "#video input[type=file]")
  )[0].send_keys(str(path))


def wait_for(condition, shown=lambda: ""):
  """Returns the first true value of a condition.

  Args:
    condition: is called until it returns something true.
    shown: returns what the page shows, for the message when time is up.
  """
  deadline = time.monotonic() + WAIT_SECS
  while not (value := condition()):
    assert time.monotonic() < deadline, shown()
    time.sleep(0.2)
  return value


def wait_for_text(chrome, name, text) -> None:
  """Waits until an element of the page has a text."""
  body = "return document.body.innerText"
  wait_for(
    lambda: text in text_of(chrome, name), lambda: chrome.execute_script(body)
  )


# The page replaces its elements at any time: what selenium has found may be
# gone when it is read or pressed, so that scripts do both at once.
def text_of(chrome, name) -> str:
  script = "return document.getElementById(arguments[0])?.innerText ?? ''"
  return chrome.execute_script(script, name)


def videos(chrome, name) -> list:
  from selenium.webdriver.common.by import By

  return chrome.find_elements(By.CSS_SELECTOR, f"#{name} video")


@pytest.mark.slow
def test_an_uploaded_face_is_seen_through_the_encoder(
  page, carphone, weights, tmp_path
):
  chrome, _, _ = page
  clip = carphone(tmp_path / "face.mp4", 60)
  upload(chrome, clip)
  wait_for_text(chrome, "status", "Predicted: ")

  # --- Pictures, as the browser draws them ------------------------------------
  for name in PICTURES:
    (video,) = wait_for(lambda name=name: videos(chrome, name))
    wait_for(lambda video=video: video.get_property("readyState") >= 2)
    assert video.get_property("videoWidth") == 224
    drawn = np.asarray(Image.open(io.BytesIO(video.screenshot_as_png)))
    assert drawn[..., :3].std() > 20, name
    with urllib.request.urlopen(video.get_property("currentSrc")) as file:
      content = io.BytesIO(file.read())
    with av.open(content) as container:
      # The first four clips, of 8 frames of the video each.
      assert len(list(container.decode(video=0))) == 16
  for chart in ("ratios", "timeline", "scores_over_time"):
    assert chrome.execute_script(
      "return document.querySelectorAll("
      f"'#{chart} canvas, #{chart} svg.marks').length"
    ), chart

  # --- Scores -----------------------------------------------------------------
  expected = Marlin.load_classifier(weights / "model").predict(clip)
  status, scores = text_of(chrome, "status"), text_of(chrome, "scores")
  assert f"Predicted: {expected.predicted[0]}." in status
  for name, probability in expected.as_dict().items():
    (shown,) = re.findall(rf"{name}\s+(\d+)%", scores)
    assert int(shown) == pytest.approx(100 * probability, abs=1)

  # --- On a phone -------------------------------------------------------------
  chromium.resize(chrome, 390)
  widths = "return [document.documentElement.scrollWidth, window.innerWidth]"
  wait_for(lambda: chrome.execute_script(widths) == [390, 390])
  chromium.resize(chrome, 1280)


def press(chrome, label) -> None:
  """Presses the button of the video with this text or description."""
  script = """
    for (const button of document.querySelectorAll("#video button"))
      if ([button.innerText.trim(), button.ariaLabel].includes(arguments[0])) {
        button.click();
        return true;
      }
    return false;
  """
  wait_for(lambda: chrome.execute_script(script, label))


def seconds_seen(chrome) -> float:
  """Returns the time of the picture that the webcam shows; 0: none yet."""
  script = """
    const video = document.querySelector("#video video");
    return video?.videoWidth ? video.currentTime : 0;
  """
  return chrome.execute_script(script)


@pytest.mark.slow
def test_a_recording_of_the_webcam_is_seen_through_the_encoder(page):
  chrome, _, _ = page
  chrome.refresh()
  press(chrome, "Capture from camera")
  press(chrome, "Click to Access Webcam")
  start = wait_for(lambda: seconds_seen(chrome))
  press(chrome, "Record")
  wait_for(lambda: seconds_seen(chrome) > start + 4)
  press(chrome, "Stop")
  wait_for_text(chrome, "status", "Predicted: ")
  assert wait_for(lambda: videos(chrome, "crop"))


@pytest.mark.slow
def test_a_video_without_a_face_is_explained(page, tmp_path):
  chrome, _, _ = page
  noise = write_video(
    tmp_path / "noise.mp4", moving_noise(40), pix_fmt="yuv420p"
  )
  upload(chrome, noise)
  wait_for_text(chrome, "status", "No face was found")
  assert not any(videos(chrome, name) for name in PICTURES)


@pytest.mark.slow
def test_text_files_are_explained(page, tmp_path):
  from selenium.webdriver.common.by import By

  chrome, _, _ = page
  for name in ("text.mp4", "text.txt"):
    (tmp_path / name).write_text("no video")
  upload(chrome, tmp_path / "text.mp4")
  wait_for_text(chrome, "status", "text.mp4: cannot open")
  upload(chrome, tmp_path / "text.txt")
  wait_for(lambda: "text.txt" in chrome.find_element(By.TAG_NAME, "body").text)


@pytest.mark.slow
def test_the_page_asks_no_other_host_and_nothing_is_kept(page):
  chrome, folder, process = page
  chrome.refresh()
  time.sleep(1)
  addresses = chromium.requested(chrome)
  others = {
    url
    for url in addresses
    if not re.match(r"http://127\.0\.0\.1:|data:|blob:|chrome", url)
  }
  assert addresses
  assert not others
  # MediaPipe's own metrics, which the documentation tells of.
  allowed = b"CONNECT play.googleapis.com:443 HTTP/1.1"
  assert not {*Proxy.lines} - {allowed}

  assert any((folder / "tmp").glob("marlin_demo_*/*"))
  process.send_signal(signal.SIGINT)
  assert process.wait(60) == 130, (folder / "log").read_text()
  assert not [*(folder / "tmp").glob("marlin_demo_*")]
