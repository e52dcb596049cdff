"""A stand-in for the HuggingFace hub: serves folders over HTTP on loopback."""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

# May write; others may only read.
TOKEN = "hf_writes"


@contextlib.contextmanager
def serving(root: Path) -> Iterator[str]:
  """Serves model repositories; yields the address.

  ROOT/OWNER/NAME is the branch `main` of a repository, ROOT/OWNER/NAME@REVISION
  another branch. With TOKEN they are created and committed to.
  """

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
      self._get(with_body=False)

    def do_GET(self):
      self._get(with_body=True)

    def _get(self, *, with_body: bool) -> None:
      parts = self.path.partition("?")[0].strip("/").split("/")
      if parts[:2] == ["api", "models"] and len(parts) >= 4:
        self._describe(*parts[2:4], parts[4:], with_body)
      elif parts[2:3] == ["resolve"]:
        self._send_file(*parts[:2], parts[3], "/".join(parts[4:]), with_body)
      else:
        self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)

    def _describe(self, owner, name, rest, with_body) -> None:
      """Answers with the files of a revision."""
      revision = rest[1] if len(rest) > 1 else "main"
      folder = _folder(root / owner, name, revision)
      if folder is None:
        there = (root / owner / name).is_dir()
        code = "RevisionNotFound" if there else "RepoNotFound"
        self._send(404, b"{}", {"X-Error-Code": code}, with_body)
        return
      files = sorted(f for f in folder.rglob("*") if f.is_file())
      names = [file.relative_to(folder).as_posix() for file in files]
      answer = {
        "id": f"{owner}/{name}",
        "sha": _commit(folder.name),
        "siblings": [{"rfilename": name} for name in names],
      }
      if rest[:1] == ["tree"]:
        answer = [
          {
            "type": "file",
            "path": name,
            "size": file.stat().st_size,
            "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
          }
          for name, file in zip(names, files, strict=True)
        ]
      self._send_json(answer, with_body)

    def _send_file(self, owner, name, commit, path, with_body) -> None:
      folder = _folder(root / owner, name, commit)
      if folder is None or not (folder / path).is_file():
        self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, with_body)
        return
      data = (folder / path).read_bytes()
      headers = {
        "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
        "X-Repo-Commit": commit,
      }
      self._send(200, data, headers, with_body)

    def do_POST(self):
      body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
      if self.headers.get("Authorization") != f"Bearer {TOKEN}":
        self._send(401, b'{"error": "Invalid username or password."}', {}, True)
        return
      parts = self.path.strip("/").split("/")
      if parts == ["api", "repos", "create"]:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        folder = root / name
        status = 409 if folder.is_dir() else 200
        folder.mkdir(parents=True, exist_ok=True)
        answer = {"url": f"{self._address}/{name}", "id": name}
        self._send(status, json.dumps(answer).encode(), {}, True)
      elif parts == ["api", "validate-yaml"]:
        self._send_json({"errors": [], "warnings": []})
      elif parts[4] == "preupload":
        files = [
          {
            "path": file["path"],
            "uploadMode": "regular",
            "shouldIgnore": False,
            "oid": None,
          }
          for file in json.loads(body)["files"]
        ]
        self._send_json({"files": files})
      elif parts[4] == "commit":
        owner, name, _, revision = parts[2:6]
        folder = _folder(root / owner, name, revision)
        for line in body.splitlines():
          entry = json.loads(line)
          if entry["key"] == "file":
            file = folder / entry["value"]["path"]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(base64.b64decode(entry["value"]["content"]))
        oid = _commit(folder.name)
        url = f"{self._address}/{owner}/{name}/commit/{oid}"
        self._send_json({"success": True, "commitOid": oid, "commitUrl": url})
      else:
        self._send(404, b"{}", {}, True)

    @property
    def _address(self) -> str:
      return f"http://127.0.0.1:{self.server.server_port}"

    def _send_json(self, answer, with_body=True) -> None:
      self._send(200, json.dumps(answer).encode(), {}, with_body)

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


def _folder(owner: Path, name: str, revision: str) -> Path | None:
  """Returns the folder of a branch or commit."""
  for folder in owner.glob(f"{name}*"):
    branch = folder.name.removeprefix(name).removeprefix("@") or "main"
    if revision in (branch, _commit(folder.name)):
      return folder
  return None


def _commit(folder: str) -> str:
  return hashlib.sha1(folder.encode()).hexdigest()
