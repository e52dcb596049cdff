"""A bucket that answers each request after a while, as Google's service does.

It serves what array_record's reader asks for: objects, whole or in part, and
their descriptions. The reader finds it by CLOUD_STORAGE_EMULATOR_ENDPOINT.
"""

import contextlib
import http.server
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator
from pathlib import Path


class SlowBucket(http.server.ThreadingHTTPServer):
  """Serves the files of a folder as the objects of every bucket.

  Attributes:
    most_at_once: the most requests that were answered at the same time.
  """

  def __init__(self, folder: Path, secs: float):
    """Takes the folder, and how long an answer takes."""
    super().__init__(("localhost", 0), _Handler)
    self.folder, self.secs = folder, secs
    self.lock = threading.Lock()
    self.num_now = self.most_at_once = 0

  @property
  def address(self) -> str:
    return f"http://localhost:{self.server_port}"

  @contextlib.contextmanager
  def answering(self) -> Iterator[None]:
    """Takes its time; counts the answers under way."""
    with self.lock:
      self.num_now += 1
      self.most_at_once = max(self.most_at_once, self.num_now)
    time.sleep(self.secs)
    yield
    with self.lock:
      self.num_now -= 1

  def handle_error(self, request, client_address):
    pass  # the reader closes connections when it has what it wants


class _Handler(http.server.BaseHTTPRequestHandler):
  server: SlowBucket

  def do_GET(self):
    url = urllib.parse.urlsplit(self.path)
    name = urllib.parse.unquote(url.path).rpartition("/")[2]
    data = (self.server.folder / name).read_bytes()
    with self.server.answering():
      if "alt=media" in url.query:
        self._send_object(data)
      else:
        about = {"name": name, "bucket": "faces", "size": str(len(data))}
        self._send(200, json.dumps(about | {"generation": "1"}).encode())

  def _send_object(self, data: bytes) -> None:
    wanted = re.fullmatch(
      r"bytes=(\d*)-(\d*)", self.headers.get("Range", "bytes=0-")
    )
    first, last = wanted.groups()
    if first:
      start, stop = int(first), min(int(last or len(data)) + 1, len(data))
    else:
      start, stop = max(len(data) - int(last), 0), len(data)
    self._send(
      206,
      data[start:stop],
      {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"},
    )

  def _send(self, status: int, body: bytes, headers=()) -> None:
    self.send_response(status)
    for key, value in dict(headers).items():
      self.send_header(key, value)
    self.send_header("Content-Length", str(len(body)))
    self.send_header("x-goog-generation", "1")
    self.end_headers()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
      self.wfile.write(body)

  def log_message(self, *_):
    pass
