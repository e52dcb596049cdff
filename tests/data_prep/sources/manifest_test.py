"""Inputs become safe paths, unique ids and stable splits, or one error."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from data_prep.sources.listing import Part, fragment_of
from data_prep.sources.manifest import ManifestError, read_input, read_sources


@pytest.fixture
def folder(tmp_path) -> Path:
  """Returns a folder with a few files named like videos, in two folders."""
  root = tmp_path / "root"
  names = ("b.mp4", "a.MKV", "one/x y, z.mp4", "two/x y, z.mp4", "one/äöü.avi")
  for name in (*names, "notes.txt", ".hidden.mp4", ".cache/c.mp4"):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(b"")
  return root


def ids(*args, **kwargs) -> list[str]:
  return [source.video_id for source in read_sources(*args, **kwargs)]


def error(*args, **kwargs) -> str:
  with pytest.raises(ManifestError) as e:
    read_sources(*args, **kwargs)
  return str(e.value)


def write(path: Path, text: str) -> Path:
  path.write_bytes(text.encode())
  return path


# --- Folders and files --------------------------------------------------------


def test_folder_gives_its_video_files_sorted_by_path(folder):
  found = read_sources(folder)
  assert [source.video_id for source in found] == [
    "a.MKV",
    "b.mp4",
    "one/x y, z.mp4",
    "one/äöü.avi",
    "two/x y, z.mp4",
  ]
  for source in found:
    assert source.path == folder / source.video_id
    assert (source.subject_id, source.split) == ("", "train")


def test_folder_without_videos_is_an_error(tmp_path):
  assert "has no video file" in error(tmp_path)
  assert "no such file or folder" in error(tmp_path / "none")


def test_single_video_is_its_own_root(folder):
  (source,) = read_sources(folder / "one" / "x y, z.mp4")
  assert source.video_id == "x y, z.mp4"


def test_links_that_leave_a_folder_are_refused_together(folder, tmp_path):
  outside = tmp_path / "outside"
  outside.mkdir()
  write(outside / "secret.mp4", "")
  (folder / "link.mp4").symlink_to(outside / "secret.mp4")
  (folder / "linked").symlink_to(outside)
  (folder / "circle.mp4").symlink_to("circle.mp4")
  (folder / "inner.mp4").symlink_to("b.mp4")
  message = error(folder)
  assert "3 bad rows, no video was opened" in message
  assert "'link.mp4' is a link that leads out of the root" in message
  assert "'linked' is a link that leads out of the root" in message
  assert "'circle.mp4'" in message
  assert "inner.mp4" not in message


def test_links_are_followed_where_they_are_trusted(folder, tmp_path):
  """As a snapshot of the Hugging Face hub: names that lead to blobs."""
  blobs, other = tmp_path / "blobs", tmp_path / "other"
  for outside in (blobs, other):
    outside.mkdir()
  write(blobs / "0a1b", "")
  write(other / "c.mp4", "")
  (folder / "one/linked.mp4").symlink_to("../../blobs/0a1b")
  (folder / "more").symlink_to(other)
  # Links in a circle end.
  (other / "circle").symlink_to(folder)
  (other / "again").symlink_to(other)
  assert "2 bad rows" in error(folder)
  assert "--follow_links reads it" in error(folder)
  found = read_input(folder, follow_links=True).sources
  assert {"one/linked.mp4", "more/c.mp4"} <= {s.video_id for s in found}
  assert len(found) == 7
  manifest = write(folder / "m.txt", "one/linked.mp4\n")
  assert "is a link that leads out" in error(manifest)
  assert len(read_input(manifest, follow_links=True).sources) == 1
  (folder / "gone.mp4").symlink_to("nowhere")
  assert "'gone.mp4': No such file" in error(folder)


def test_links_to_other_files_of_a_folder_are_left_out(folder, tmp_path):
  """Else one video could be in two splits."""
  before = ids(folder)
  (folder / "c.mp4").symlink_to(folder / ".cache/c.mp4")
  (folder / "latest.mp4").symlink_to(folder / "b.mp4")
  outer = write(tmp_path / "outer", "outer")
  found = read_input(folder)
  assert [s.video_id for s in found.sources] == sorted([*before, "c.mp4"])
  assert "1 link to other files of the input left out." in found.notes
  for name in ("x.mp4", "y.mp4"):
    (folder / name).symlink_to(outer)
  followed = read_input(folder, follow_links=True).sources
  found = [source.video_id for source in followed]
  assert found == sorted([*before, "c.mp4", "x.mp4"])
  # A table says what it wants.
  table = write(folder / "m.csv", "path\nb.mp4\nlatest.mp4\n")
  assert ids(table) == ["b.mp4", "latest.mp4"]


def test_missing_files_are_left_out_where_that_is_asked_for(folder):
  manifest = write(folder / "m.csv", "path,split\nb.mp4,a\ngone.mp4,a\n")
  assert "row 3: 'gone.mp4': No such file" in error(manifest)
  found = read_input(manifest, skip_missing=True)
  assert [source.video_id for source in found.sources] == ["b.mp4"]
  assert found.notes == ["1 of 2 files are missing."]
  write(folder / "m.csv", "path\ngone.mp4\nhttps://x.org/v.mp4\n")
  with pytest.raises(ManifestError, match="is an address"):
    read_input(manifest, skip_missing=True)
  write(folder / "m.csv", "path\ngone.mp4\n")
  with pytest.raises(ManifestError, match="none of its 1 files is below"):
    read_input(manifest, skip_missing=True)


def test_files_with_other_suffixes_are_counted(folder, tmp_path):
  assert read_input(folder).notes == [
    "1 file of root left out for other suffixes: 1 .txt."
  ]
  for name in ("a.ts", "b.vob", "c.asf", "d.3g2", "e.qt", "f.mp5", "g"):
    write(folder / "two" / name, "")
  found = read_input(folder)
  assert len(found.sources) == 10
  assert found.notes == [
    "3 files of root left out for other suffixes: 1 without a suffix, 1 .mp5, "
    "1 .txt."
  ]
  (tmp_path / "none").mkdir()
  write(tmp_path / "none/x.doc", "")
  with pytest.raises(
    ManifestError, match=r"has no video file .*; it has 1 .doc"
  ):
    read_input(tmp_path / "none")


def test_control_characters_in_a_folder_are_refused(folder):
  write(folder / "a\nb.mp4", "")
  assert r"'a\nb.mp4' contains a control character" in error(folder)


# --- Manifests ----------------------------------------------------------------


def test_text_manifest_takes_lines_as_they_are(folder):
  manifest = write(
    folder / "m.txt", "\ufeffone/x y, z.mp4\r\n\r\n./b.mp4\r\none//äöü.avi"
  )
  assert ids(manifest) == ["b.mp4", "one/x y, z.mp4", "one/äöü.avi"]


def test_csv_manifest_is_parsed_with_quotes_and_byte_order_mark(folder):
  manifest = write(
    folder / "m.csv",
    "\ufeffsubject_id,path,split\r\n"
    'Anna,"one/x y, z.mp4",train\r\n'
    '"Bob ""B""",b.mp4,test\r\n',
  )
  b, xyz = read_sources(manifest)
  assert (b.video_id, b.subject_id, b.split) == ("b.mp4", 'Bob "B"', "test")
  assert (xyz.video_id, xyz.subject_id) == ("one/x y, z.mp4", "Anna")


def test_root_may_lie_elsewhere(folder, tmp_path):
  manifest = write(tmp_path / "m.txt", "b.mp4\n")
  assert "row 1: 'b.mp4': No such file" in error(manifest)
  (source,) = read_sources(manifest, root=folder)
  assert source.path == folder / "b.mp4"
  assert "--root needs a manifest" in error(folder, root=folder)
  assert "is not a folder" in error(manifest, root=folder / "b.mp4")


def test_equal_names_in_two_folders_stay_two_videos(folder):
  manifest = write(folder / "m.txt", "one/x y, z.mp4\ntwo/x y, z.mp4\n")
  assert len(set(ids(manifest))) == 2


def test_unsafe_rows_are_all_listed_and_nothing_is_opened(folder, tmp_path):
  outside = write(tmp_path / "outside.mp4", "")
  (folder / "link.mp4").symlink_to(outside)
  os.mkfifo(folder / "pipe.mp4")  # opening it would block for ever
  rows = {
    2: ("../../etc/passwd", "leads out of the root"),
    3: ("one/../../outside.mp4", "leads out of the root"),
    4: ("/abs/x.mp4", "is absolute"),
    5: ("a\0b.mp4", "control character"),
    6: ("http://host/x.mp4", "is an address"),
    7: ("concat:b.mp4|a.MKV", "is an address"),
    8: ("file:b.mp4", "is an address"),
    9: ("link.mp4", "is a link that leads out"),
    10: ("pipe.mp4", "is not a regular file"),
    11: ("one", "is not a regular file"),
    12: ("none.mp4", "No such file"),
    13: ("", "the path is empty"),
    14: ("b.mp4,x", "2 columns, expected 1"),
  }
  lines = [path if path else '""' for path, _ in rows.values()]
  manifest = write(folder / "m.csv", "\n".join(["path", *lines]) + "\n")
  message = error(manifest)
  assert f"{len(rows)} bad rows, no video was opened" in message
  for number, (_, problem) in rows.items():
    (line,) = [x for x in message.splitlines() if f"row {number}:" in x]
    assert problem in line
  assert "\0" not in message


def test_path_over_two_lines_is_refused(folder):
  manifest = write(folder / "m.csv", 'path\n"a\nb.mp4"\n')
  assert r"row 3: path 'a\nb.mp4' contains a control character" in error(
    manifest
  )


def test_colon_in_the_name_of_a_real_file_is_no_address(folder):
  write(folder / "Part 1: start.mp4", "")
  write(folder / "Part1: start.mp4", "")
  assert "Part1: start.mp4" in ids(folder)


def test_paths_of_many_folders_are_refused_or_read(folder):
  assert "No such file" in error(write(folder / "m.txt", "a/" * 1500 + "b.mp4"))
  assert "too long" in error(write(folder / "m.txt", "a/" * 9000 + "b.mp4"))
  assert ids(write(folder / "m.txt", "./" * 1500 + "b.mp4")) == ["b.mp4"]
  (folder / "inner").symlink_to("one")
  (folder / "outer").symlink_to("..")
  inner = write(folder / "m.txt", "inner/x y, z.mp4")
  assert len(read_sources(inner)) == 1
  assert "leads out" in error(write(folder / "m.txt", "outer/root/b.mp4"))


def test_long_lists_of_bad_rows_are_cut(folder):
  manifest = write(folder / "m.txt", "".join(f"no{i}\n" for i in range(50)))
  message = error(manifest)
  assert "50 bad rows" in message
  assert "and 30 more" in message
  assert len(message.splitlines()) == 22


@pytest.mark.parametrize(
  ("text", "problem"),
  [
    ("", "the header is []"),
    ("path\n", "lists no video"),
    ("file\nb.mp4\n", "the header is ['file']"),
    ("path,label\nb.mp4,1\n", "the header is ['path', 'label']"),
    ("path;split\nb.mp4;a\n", "the header is ['path;split']"),
    ("path,path\nb.mp4,b.mp4\n", "the header is"),
    ("path,subject_id\nb.mp4\n", "row 2: 1 columns, expected 2"),
    ('path\n"b.mp4\n', "row 2: unexpected end of data"),
    ("path\nb.mp4\n./b.mp4\n", "row 3: './b.mp4' is listed twice (row 2)"),
    ("path,split\nb.mp4,Train!\n", "row 2: split 'Train!' is not made of"),
    (
      "path,split\nb.mp4,a\na.MKV,\n",
      "row 3: 'a.MKV' has no split, but 'b.mp4' has (row 2)",
    ),
    (
      "path,subject_id,split\nb.mp4,s,a\na.MKV,s,b\n",
      "row 3: subject 's' is in split 'b', but in 'a' (row 2)",
    ),
    (
      "path,split,end_secs\nb.mp4,a,2\nb.mp4,b,3\n",
      "row 3: file 'b.mp4' is in split 'b', but in 'a' (row 2)",
    ),
    ("path,x0,y0,x1\nb.mp4,0,0,1\n", "the header is"),
    ("path,end_secs\nb.mp4,1:20\n", "row 2: end_secs is '1:20', expected a"),
    ("path,start_secs\nb.mp4,inf\n", "row 2: start_secs is 'inf'"),
    (
      "path,start_secs,end_secs\nb.mp4,5,2\n",
      "row 2: 'b.mp4': it starts at 5 s and ends at 2 s",
    ),
    (
      "path,x0,y0,x1,y1\nb.mp4,10,20,100,200\n",
      "row 2: 'b.mp4': its box is 10, 20, 100, 200, expected x0 < x1",
    ),
    ("path,x0,y0,x1,y1\nb.mp4,0,0,1,\n", "row 2: only some of x0, y0, x1, y1"),
    (
      "path,start_secs\nb.mp4,1\nb.mp4,1.0\n",
      "row 3: 'b.mp4#t=1' is listed twice (row 2)",
    ),
  ],
)
def test_malformed_csv_is_an_error_with_row_number(folder, text, problem):
  assert problem in error(write(folder / "m.csv", text))


def test_rows_of_one_file_are_videos_with_ids_of_their_own(folder):
  manifest = write(
    folder / "m.csv",
    "path,start_secs,end_secs,x0,y0,x1,y1\n"
    "b.mp4,81.62,86.17,0.1964,0,.6922,0.8815\nb.mp4,90,,,,,\nb.mp4,,5,,,,\n"
    "a.MKV,,,,,,\n",
  )
  found = {s.video_id: s for s in read_input(manifest, val_ratio=0.5).sources}
  assert [*found] == [
    "a.MKV",
    "b.mp4#t=0,5",
    "b.mp4#t=81.62,86.17&box=0.1964,0,0.6922,0.8815",
    "b.mp4#t=90",
  ]
  parts = [source.part for source in found.values()]
  assert parts == [
    Part(),
    Part(end_secs=5),
    Part(81.62, 86.17, (0.1964, 0, 0.6922, 0.8815)),
    Part(90),
  ]
  for source in found.values():
    assert Part.from_json(json.loads(json.dumps(asdict(source.part)))) == (
      source.part
    )
    assert fragment_of(source.video_id) == source.part.fragment
  assert fragment_of("a#t=1,2.mp4") == fragment_of("b#box=1/a.mp4") == ""
  # The parts of a file do not come apart.
  assert len({s.split for s in found.values() if s.path.name == "b.mp4"}) == 1


def test_manifest_that_is_no_text_is_an_error(folder):
  (folder / "m.csv").write_bytes(b"path\n\xff\xfe.mp4\n")
  assert "is not UTF-8 text" in error(folder / "m.csv")
  assert "lists no video" in error(write(folder / "m.txt", "\n"))


# --- Splits -------------------------------------------------------------------


@pytest.fixture
def people(tmp_path) -> Path:
  """Writes a manifest of 300 videos of 100 people."""
  rows = ["path,subject_id"]
  for i in range(300):
    write(tmp_path / f"{i}.mp4", "")
    rows.append(f"{i}.mp4,person {i % 100}")
  return write(tmp_path / "m.csv", "\n".join(rows))


def test_people_are_in_one_split_only(people):
  sources = read_input(people, val_ratio=0.3).sources
  splits = {}
  for source in sources:
    splits.setdefault(source.subject_id, set()).add(source.split)
  assert all(len(found) == 1 for found in splits.values())
  num_val = sum(found == {"val"} for found in splits.values())
  assert 15 <= num_val <= 45


def test_blanks_around_a_name_make_no_other_person(folder):
  text = "path,subject_id,split\nb.mp4,Ann ,test\na.MKV, Ann, test\n"
  sources = read_input(write(folder / "m.csv", text)).sources
  assert {(s.subject_id, s.split) for s in sources} == {("Ann", "test")}
  text = text.replace(" test", "train")
  assert "subject 'Ann' is in split" in error(write(folder / "m.csv", text))


def test_split_of_a_video_does_not_depend_on_the_others(people, tmp_path):
  every = {
    s.video_id: s.split for s in read_input(people, val_ratio=0.5).sources
  }
  assert set(every.values()) == {"train", "val"}
  lines = people.read_text().splitlines()
  shuffled = write(tmp_path / "n.csv", "\n".join([lines[0], *lines[:100:-1]]))
  for source in read_input(shuffled, val_ratio=0.5).sources:
    assert source.split == every[source.video_id]


def test_larger_ratio_only_adds_to_val(people):
  def val(ratio):
    sources = read_input(people, val_ratio=ratio).sources
    return {s.video_id for s in sources if s.split == "val"}

  assert val(0.0) == set()
  assert val(0.1) < val(0.3) < val(0.9)


def test_splits_of_a_manifest_win_over_the_ratio(folder):
  manifest = write(folder / "m.csv", "path,split\nb.mp4,test\na.MKV,train\n")
  for source in read_input(manifest, val_ratio=0.99).sources:
    assert source.split == {"b.mp4": "test", "a.MKV": "train"}[source.video_id]


def test_sample_is_three_videos(sample_videos):
  assert ids("sample") == [
    "bigbuckbunny.mp4",
    "bikes.mp4",
    "carphone_pristine.mp4",
  ]
