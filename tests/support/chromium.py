"""A headless Chromium for tests of web pages."""

import contextlib
import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

_FLAGS = (
  "--headless",
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
)


@contextlib.contextmanager
def browser(
  folder: Path, width: int = 1280, camera: Path | None = None
) -> Iterator:
  """Starts a browser; skips the test where there is none.

  Args:
    folder: new folder of its profile.
    width: width of the window in pixels.
    camera: a .mjpeg file that the browser has for a webcam; without it none.

  Yields:
    A selenium.webdriver.Chrome.
  """
  driver = shutil.which("chromedriver")
  chromium = shutil.which("chromium") or shutil.which("google-chrome")
  if not (driver and chromium and importlib.util.find_spec("selenium")):
    pytest.skip("needs chromium, chromedriver and the package selenium")
  from selenium import webdriver

  options = webdriver.ChromeOptions()
  options.binary_location = chromium
  for flag in (*_FLAGS, f"--user-data-dir={folder}"):
    options.add_argument(flag)
  if camera is not None:
    options.add_argument("--use-fake-ui-for-media-stream")
    options.add_argument("--use-fake-device-for-media-stream")
    options.add_argument(f"--use-file-for-fake-video-capture={camera}")
  options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
  chrome = webdriver.Chrome(options, webdriver.ChromeService(driver))
  try:
    resize(chrome, width)
    yield chrome
  finally:
    chrome.quit()


def resize(chrome, width: int, height: int = 900) -> None:
  """Sets the size of the page; narrow ones are those of a phone."""
  chrome.execute_cdp_cmd(
    "Emulation.setDeviceMetricsOverride",
    {
      "width": width,
      "height": height,
      "deviceScaleFactor": 1,
      "mobile": width < 600,
    },
  )


def requested(chrome) -> set[str]:
  """Returns the addresses that pages have asked for since the last call."""
  messages = [
    json.loads(entry["message"])["message"]
    for entry in chrome.get_log("performance")
  ]
  return {
    message["params"]["request"]["url"]
    for message in messages
    if message["method"] == "Network.requestWillBeSent"
  }
