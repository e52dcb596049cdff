"""Paths and errors of files on the command line."""

import argparse

import pytest

from marlin_jax.records import cli
from marlin_jax.records.folders import Lock, OutputFolderError


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("gs://bucket/a.html", "is in a bucket, expected a path on a disk"),
    ("a.pdf", "a.pdf does not end with .html or .htm"),
    ("page.html", "page.html is a folder, expected a file"),
    ("notes/b/a.html", "notes is a file, expected a folder"),
  ],
)
def test_a_file_that_cannot_be_written_is_refused_before_the_work(
  tmp_path, monkeypatch, name, words
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "notes").touch()
  (tmp_path / "page.html").mkdir()
  parse = cli.output_file(".html", ".htm")
  assert parse("new/folder/a.HTML").name == "a.HTML"
  assert parse("a" * 300 + ".html").suffix == ".html"  # is told when written
  with pytest.raises(argparse.ArgumentTypeError, match=words):
    parse(name)


def test_errors_of_files_name_the_file_and_what_was_expected(tmp_path, capsys):
  file = tmp_path / "file"
  file.touch()
  for work, words in (
    (lambda: file.mkdir(exist_ok=True), "file is where a folder is expected"),
    ((file / "a").read_text, "file is where a folder is expected"),
    ((tmp_path / "a").read_text, f"error: {tmp_path / 'a'}: No such file"),
    (tmp_path.read_text, f"error: {tmp_path}: Is a directory"),
  ):
    assert cli.run_command(work) == 1
    message = capsys.readouterr().err
    assert words in message
    assert "Errno" not in message
  with pytest.raises(OutputFolderError, match="file is where a folder is"):
    Lock(file)
