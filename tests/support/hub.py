"""A stand-in for the HuggingFace hub: serves folders over HTTP on loopback."""

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

_COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serving(root: Path) -> Iterator[str]:
  """Serves ROOT/OWNER/NAME as model repositories; yields the address."""

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
      self._answer(with_body=False)

    def do_GET(self):
      self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
      parts = self.path.partition("?")[0].strip("/").split("/")
      if parts[:2] == ["api", "models"] and len(parts) >= 4:
        folder = root.joinpath(*parts[2:4])
        if not folder.is_dir():
          self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)
          return
        files = sorted(folder.iterdir())
        answer = {
          "id": "/".join(parts[2:4]),
          "sha": _COMMIT,
          "siblings": [{"rfilename": file.name} for file in files],
        }
        if parts[4:5] == ["tree"]:
          answer = [
            {
              "type": "file",
              "path": file.name,
              "size": file.stat().st_size,
              "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
            }
            for file in files
          ]
        self._send(200, json.dumps(answer).encode(), {}, with_body)
        return
      # OWNER/NAME/resolve/REVISION/FILE
      file = root.joinpath(*parts[:2], *parts[4:])
      if parts[2:3] != ["resolve"] or not file.is_file():
        self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)
        return
      data = file.read_bytes()
      headers = {
        "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
        "X-Repo-Commit": _COMMIT,
      }
      self._send(200, data, headers, with_body)

    def _send(self, status, data, headers, with_body) -> None:
      self.send_response(status)
      for name, value in headers.items():
        self.send_header(name, value)
      self.send_header("Content-Length", str(len(data)))
      self.end_headers()
      if with_body:
        self.wfile.write(data)

    def log_message(self, *_) -> None:
      pass

  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield f"http://127.0.0.1:{server.server_port}"
  finally:
    server.shutdown()
    thread.join()
    server.server_close()
