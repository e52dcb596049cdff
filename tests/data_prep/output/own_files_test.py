"""Nothing of the user's is removed or overwritten by data_prep.prepare."""

import json
from pathlib import Path

import pytest

from data_prep.output import own_files
from marlin_jax.records import folders
from marlin_jax.records.folders import OutputFolderError
from tests.support import made_dataset
from tests.support.files import content
from tests.support.processes import run_prepare


def refusal(*args: object) -> str:
  result = run_prepare(*args)
  assert result.returncode == 1
  assert result.stderr.startswith("error: ")
  return result.stderr


def files_of_the_user(folder: Path, *names: str) -> Path:
  for name in names:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"of the user: {name}")
  return folder


@pytest.mark.parametrize(
  ("source", "output"),
  [
    ("celebv/parts", "celebv"),  # deleted by an earlier version
    ("celebv", "celebv"),
    ("celebv", "celebv/faces"),
    ("celebv/parts", "link"),
    ("link", "celebv/faces"),
    ("celebv/parts/v.mp4", "celebv/parts"),
    ("celebv/parts/list.txt", "celebv"),
    ("list.txt", "celebv/parts"),
  ],
)
def test_output_that_shares_a_folder_with_the_input_is_refused(
  tmp_path, source, output
):
  files_of_the_user(tmp_path / "celebv", "parts/v.mp4", "parts/notes.txt")
  (tmp_path / "celebv/parts/list.txt").write_text("v.mp4\n")
  (tmp_path / "list.txt").write_text("celebv/parts/v.mp4\n")
  (tmp_path / "link").symlink_to("celebv", target_is_directory=True)
  before = content(tmp_path)
  message = refusal("--input", tmp_path / source, "--output", tmp_path / output)
  assert "the input" in message
  assert content(tmp_path) == before
  assert not (tmp_path / "celebv/faces").exists()


@pytest.mark.parametrize(
  "name",
  [
    "movie.mp4.partial",  # of a browser; deleted by an earlier version
    "parts/notes.txt",
    "parts/v.array_record",
    "videos.jsonl",
    "settings.json",
  ],
)
@pytest.mark.parametrize("flags", [[], ["--task_index=0", "--task_count=2"]])
def test_folder_of_something_else_is_refused(tmp_path, name, flags):
  output = files_of_the_user(tmp_path / "output", name)
  videos = files_of_the_user(tmp_path / "videos", "v.mp4")
  before = content(output)
  message = refusal("--input", videos, "--output", output, *flags)
  assert name in message
  assert content(output) == before


def test_settings_of_another_program_are_refused(tmp_path):
  output = files_of_the_user(tmp_path / "output", "movie.mp4.partial")
  (output / "settings.json").write_text('{"editor.fontSize": 14}')
  videos = files_of_the_user(tmp_path / "videos", "v.mp4")
  before = content(output)
  assert "settings.json was not" in refusal(
    "--input", videos, "--output", output
  )
  assert content(output) == before


def test_parts_that_are_a_link_are_refused(tmp_path):
  other = files_of_the_user(tmp_path / "other", f"{'0' * 32}.json")
  videos = files_of_the_user(tmp_path / "videos", "v.mp4")
  (tmp_path / "output").mkdir()
  (tmp_path / "output/parts").symlink_to(other, target_is_directory=True)
  message = refusal("--input", videos, "--output", tmp_path / "output")
  assert "parts is not a folder of this program" in message
  assert len(content(other)) == 1


def test_files_of_the_user_in_a_data_set_stay_as_it_grows(tmp_path):
  path = tmp_path / "dataset"
  videos = {"a.mp4": [made_dataset.a_record("a.mp4")]}
  made_dataset.make(path, videos, num_shards=1)
  names = [
    *("notes.txt", "movie.mp4.partial", "x.array_record.12345678.partial"),
    *("parts/notes.txt", "parts/v.partial", "parts/x.json", "parts/v.ready"),
  ]
  files_of_the_user(path, *names)
  ours = [
    *("videos.jsonl.0123abcd.partial", f"parts/{'0' * 32}.json"),
    f"parts/{'1' * 32}.array_record.0123abcd.partial",
    *("parts/jobs-0.jsonl", "parts/task-3-of-4.lock"),
    "parts/faces-train.array_record-00000-of-00001.ready.0123abcd.partial",
  ]
  for name in ours:
    (path / name).write_text("of a run that was killed")
  videos["b.mp4"] = [made_dataset.a_record("b.mp4")]
  made_dataset.make(path, videos, num_shards=1)
  found = content(path)
  for name in names:
    assert found[name] == f"of the user: {name}".encode()
  assert found.keys().isdisjoint(ours)
  (path / "parts").rename(tmp_path / "parts")
  made_dataset.make(path, videos | {"c.mp4": videos["a.mp4"][:0]}, num_shards=1)
  assert not (path / "parts").exists()


@pytest.mark.parametrize("is_link", [False, True])
def test_a_lock_does_not_replace_a_file_of_the_user(tmp_path, is_link):
  file = tmp_path / "folder/task-0-of-2.lock"
  file.parent.mkdir()
  target = tmp_path / "thesis.txt" if is_link else file
  target.write_text("three years of work")
  if is_link:
    file.symlink_to(target)
  with pytest.raises(OutputFolderError):
    folders.Lock(file.parent, file.name)
  assert target.read_text() == "three years of work"
  folders.Lock(tmp_path, "lock").close()
  folders.Lock(tmp_path, "lock").close()  # its own file


def test_all_files_of_a_data_set_are_own(tmp_path):
  path = tmp_path / "dataset"
  made_dataset.make(path, {"a.mp4": [made_dataset.a_record("a.mp4")]})
  for file in path.iterdir():
    assert own_files._LEFTOVER_FILE.fullmatch(f"{file.name}.0123abcd.partial")
  settings = json.loads((path / "settings.json").read_text())
  own_files.check_folder(path, settings)
