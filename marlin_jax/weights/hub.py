"""Folders of the HuggingFace hub: downloads them and publishes them.

Needs the extra 'hub'. Only data is downloaded, no code.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import re
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from marlin_jax.records.folders import sha256_of
from marlin_jax.weights.weights import WeightsError

_PREFIX = "hf://"
# OWNER/NAME or OWNER/NAME@REVISION.
_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*?)(?:@([\w./-]+))?")
# Files that are data.
_DATA = ("*.json", "*.safetensors", "pytorch_model.bin")


def is_id(source: str) -> bool:
  """Returns whether a source is hf://OWNER/NAME, or OWNER/NAME."""
  return source.startswith(_PREFIX) or bool(_ID.fullmatch(source))


def fetch(source: str) -> Path:
  """Downloads a folder, or finds it in the cache of huggingface_hub.

  Args:
    source: OWNER/NAME or hf://OWNER/NAME, with @REVISION for a branch, tag or
      commit. A commit pins the content.

  Raises:
    WeightsError: huggingface_hub is missing, or there is no such folder.
  """
  name, revision = _parsed(source)
  library = _library(name)
  try:
    folder = library.snapshot_download(
      name, revision=revision, allow_patterns=list(_DATA)
    )
  except (OSError, ValueError, library.errors.HfHubHTTPError) as e:
    raise WeightsError(
      f"'{source}' is no file or folder here, and cannot be fetched from the "
      f"HuggingFace hub: {_reason(e)}"
    ) from e
  return Path(folder)


def push(
  write: Callable[[Path], object],
  target: str,
  card: Card,
  *,
  private: bool = False,
) -> str:
  """Publishes a model with its card, in one commit.

  Uses the login of `hf auth login`, or HF_TOKEN. Files of other names on the
  hub stay.

  Args:
    write: writes the files into a folder.
    target: OWNER/NAME or hf://OWNER/NAME, created if missing, with @REVISION
      for a branch that is there.
    card: content of README.md.
    private: create it as a private one.

  Returns:
    The address of the commit.

  Raises:
    WeightsError: huggingface_hub is missing, or the hub refuses.
  """
  name, revision = _parsed(target)
  library = _library(name)
  with tempfile.TemporaryDirectory(prefix="marlin_jax_") as temporary:
    folder = Path(temporary)
    write(folder)
    (folder / "README.md").write_text(card.text(name, folder))
    try:
      library.create_repo(name, private=private, exist_ok=True)
      commit = library.upload_folder(
        repo_id=name,
        folder_path=folder,
        revision=revision,
        commit_message="Upload with marlin_jax",
      )
    except (OSError, ValueError, library.errors.HfHubHTTPError) as e:
      raise WeightsError(
        f"'{target}' cannot be written on the HuggingFace hub: {_reason(e)}\n"
        "Log in with 'hf auth login', or set HF_TOKEN to a token that may write"
      ) from e
  return commit.commit_url


def _parsed(source: str) -> tuple[str, str | None]:
  match = _ID.fullmatch(source.removeprefix(_PREFIX))
  if match is None:
    raise WeightsError(
      f"'{source}' is no name on the HuggingFace hub, expected OWNER/NAME"
    )
  return match[1], match[2]


def _library(name: str):
  try:
    import huggingface_hub
  except ImportError as e:
    raise WeightsError(
      f"no weights at '{name}'. If it is on the HuggingFace hub: pip install "
      "'marlin-jax[hub]'"
    ) from e
  return huggingface_hub


def _reason(error: Exception) -> str:
  return " ".join(str(error).split())


# --- Model card ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Card:
  """Content of the README.md of a published model.

  Attributes:
    license: identifier of the hub, such as cc-by-nc-4.0. The terms of the data
      bind what was trained on them.
    data: the videos that it was trained on, in words.
    description: the model, in words.
    usage: lines of Python that apply it; NAME stands for its name.
    facts: further lines of the table, such as hashes, by name.
    results: see `read_results`.
  """

  license: str
  data: str
  description: str
  usage: str
  facts: Mapping[str, str]
  results: Sequence[Result] = ()

  def text(self, name: str, folder: Path) -> str:
    """Returns the README.md.

    Args:
      name: OWNER/NAME.
      folder: the files to publish, whose hashes are listed.
    """
    library = _library(name)
    metadata = library.ModelCardData(
      license=self.license,
      library_name="marlin_jax",
      pipeline_tag="video-classification",
      tags=["face", "video", "marlin", "jax"],
      model_name=name,
      eval_results=[
        library.EvalResult(
          task_type="video-classification",
          task_name=result.task,
          dataset_type=result.data,
          dataset_name=result.data,
          metric_type=result.metric,
          metric_name=f"{result.metric} ({result.mode})",
          metric_value=result.value,
        )
        for result in self.results
      ]
      or None,
    ).to_yaml()
    files = sorted(folder.rglob("*.safetensors"))
    rows = {
      "licence": self.license,
      "trained on": self.data,
      **self.facts,
      **{
        f"sha256 of {file.relative_to(folder).as_posix()}": sha256_of(file)
        for file in files
      },
      "written by": f"marlin_jax {importlib.metadata.version('marlin-jax')}",
    }
    facts = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    usage = textwrap.indent(self.usage.replace("NAME", name), "    ")
    return (
      f"---\n{metadata}\n---\n\n# {name}\n\n{self.description}\n\n{usage}\n\n"
      f"| | |\n|---|---|\n{facts}\n{self._table()}\n{_RESPONSIBLE}"
    )

  def _table(self) -> str:
    if not self.results:
      return "\nIt has not been evaluated.\n"
    lines = "\n".join(
      f"| {r.task} | {r.mode} | {r.data} | {r.metric} | {r.value:.4f} "
      f"[{_number(r.low)}, {_number(r.high)}] |"
      for r in self.results
    )
    return (
      "\n## Results\n\nWith 95% intervals by bootstrap over people.\n\n"
      "| task | mode | tested on | metric | |\n|---|---|---|---|---|\n"
      f"{lines}\n"
    )


_RESPONSIBLE = """
## Responsible use

Faces are biometric data. Do not use this model to identify, profile or deceive
people without their consent. Scores hold for people like those of the data, and
may be worse for others: test on your own before you rely on it.
"""


class Result(NamedTuple):
  """A number of a model card, with its 95% interval."""

  task: str
  mode: str
  data: str
  metric: str
  value: float
  low: float | None
  high: float | None


def read_results(
  workdirs: Iterable[str | os.PathLike], encoder_sha256: str, cell: str = ""
) -> list[Result]:
  """Reads the results of evaluations of an encoder.

  Args:
    workdirs: workdirs of evaluations.
    encoder_sha256: hash of the encoder that was evaluated.
    cell: name of the one cell to read, that of a trained model or of a fold's;
      '': all modes with the whole training data.

  Raises:
    WeightsError: there are no results, or they are of another encoder.
  """
  return [
    Result(
      row["task"], row["mode"], data, metric, value, entry["low"], entry["high"]
    )
    for workdir in map(Path, workdirs)
    for row, tests in _rows(workdir, encoder_sha256, cell)
    for data, metrics in tests.items()
    for metric, entry in metrics.items()
    if (value := entry.get("mean", entry.get("value"))) is not None
  ]


def _rows(
  workdir: Path, sha256: str, cell: str
) -> Iterator[tuple[dict, dict[str, dict]]]:
  """Yields the rows of a results.json, and their metrics by data set."""
  try:
    results = json.loads((workdir / "results.json").read_text())
    found, data = results["checkpoint"]["sha256"], results["data"]
    summary, cells = results["summary"], results["cells"]
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise WeightsError(
      f"{workdir}: expected the workdir of an evaluation, with results.json"
    ) from e
  if found != sha256:
    raise WeightsError(
      f"{workdir} holds results of the encoder {found[:12]}, and this is "
      f"{sha256[:12]}"
    )
  # Folds may take all videos, and have a model each.
  tested = data["splits"].get("test") or data["splits"]["all"]
  own = f"{Path(data['path']).name}:{tested['name']}"
  if "test" in data["splits"]:  # which does not say what was trained on
    for key in ("folds", "train_classes"):
      if rule := results["config"].get(f"data.{key}"):
        own += f", {key}={rule}"
  for row in summary if not cell else ():
    if row["ratio"] == 1:
      yield row, _by_name(own, row["metrics"], row["tests"])
  fits = (fit for row in cells for fit in (row, *row.get("folds", ())))
  for row in fits if cell else ():
    if row["name"] == cell:
      tests = {name: test["metrics"] for name, test in row["tests"].items()}
      where = f"{own} ({row['fold']})" if row.get("fold") else own
      yield row, _by_name(where, row["test"]["metrics"], tests)


def _by_name(own: str, metrics: dict, tests: dict[str, dict]) -> dict:
  """Returns metrics by data set, without the folders of this machine."""
  return {own: metrics} | {
    Path(name).name: values for name, values in tests.items()
  }


def _number(value: float | None) -> str:
  return "-" if value is None else f"{value:.3f}"
