"""Files appear whole or not at all, and locks name their holder."""

import hashlib
import os
from pathlib import Path

import pytest

from marlin_jax.records import folders


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
  path = tmp_path / "a.json"
  folders.write_bytes(path, b"old")

  def write_half():
    with folders.atomic_path(path) as partial:
      partial.write_bytes(b"ne")
      assert folders.final_name(partial.name) == path.name
      assert partial.suffix == folders.PARTIAL_SUFFIX
      raise OSError("the disk is full")

  with pytest.raises(OSError, match="full"):
    write_half()
  assert path.read_bytes() == b"old"
  assert list(tmp_path.iterdir()) == [path]


def test_a_write_replaces_the_file(tmp_path):
  path = tmp_path / "a.json"
  for data in (b"old", b"new"):
    folders.write_bytes(path, data)
    assert path.read_bytes() == data
  assert list(tmp_path.iterdir()) == [path]


def test_two_writers_of_one_file_use_different_names():
  assert folders.partial_name("a") != folders.partial_name("a")


def test_hash_of_a_folder_is_that_of_its_files_in_order(tmp_path):
  for name, data in (("b", b"2"), ("a", b"1")):
    (tmp_path / name).write_bytes(data)
  lines = [
    f"{hashlib.sha256(data).hexdigest()} {name}\n"
    for name, data in (("a", b"1"), ("b", b"2"))
  ]
  expected = hashlib.sha256("".join(lines).encode()).hexdigest()
  assert folders.sha256_of(tmp_path) == expected


@pytest.mark.parametrize("value", [None, ""])
def test_cache_without_a_variable_is_in_the_home_folder(value, monkeypatch):
  monkeypatch.delenv("MARLIN_HOME", raising=False)
  if value is not None:
    monkeypatch.setenv("MARLIN_HOME", value)
  assert folders.cache_home() == Path.home() / ".cache" / "marlin_jax"


def test_cache_is_where_the_variable_says(tmp_path, monkeypatch):
  monkeypatch.setenv("MARLIN_HOME", str(tmp_path))
  assert folders.cache_home() == tmp_path


def test_a_second_lock_names_the_process_that_holds_the_first(tmp_path):
  lock = folders.Lock(tmp_path, "lock")
  with pytest.raises(folders.OutputFolderError, match=f"process {os.getpid()}"):
    folders.Lock(tmp_path, "lock")
  lock.close()
  folders.Lock(tmp_path, "lock").close()


def test_shared_locks_keep_out_an_exclusive_one(tmp_path):
  shared = [folders.Lock(tmp_path, shared=True) for _ in range(2)]
  with pytest.raises(folders.OutputFolderError, match="another run"):
    folders.Lock(tmp_path)
  for lock in shared:
    lock.close()
  folders.Lock(tmp_path).close()


def test_a_user_without_a_home_folder_is_told_what_to_set(monkeypatch):
  monkeypatch.delenv("HOME", raising=False)
  monkeypatch.delenv("MARLIN_HOME", raising=False)
  monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)  # not in passwd
  with pytest.raises(folders.OutputFolderError, match="set MARLIN_HOME"):
    folders.cache_home()
