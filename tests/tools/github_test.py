"""Files for GitHub, pre-commit and citations agree with the repository."""

import re
import tomllib

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from marlin_jax import __version__
from tests.support.processes import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read(name):
  return yaml.safe_load((ROOT / name).read_text())


def test_the_workflow_runs_what_developers_run():
  (job,) = read(".github/workflows/test.yml")["jobs"].values()
  commands = [step["run"] for step in job["steps"] if "run" in step]
  install, *targets = commands
  assert targets == ["make lint", "make test", "make test-all"]
  defined = re.findall(
    r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE
  )
  assert {target.removeprefix("make ") for target in targets} <= set(defined)
  # On every event either the quick tests or all of them.
  quick, every = (step["if"] for step in job["steps"][-2:])
  assert quick.replace("!=", "==") == every
  (libraries,) = re.findall(
    r"^ +(libgl1 .*)$", (ROOT / "README.md").read_text(), re.MULTILINE
  )
  assert libraries in install
  supported = SpecifierSet(PROJECT["requires-python"])
  assert job["strategy"]["matrix"]["python"]
  assert all(map(supported.contains, job["strategy"]["matrix"]["python"]))
  for step in job["steps"]:
    assert re.fullmatch(
      r"actions/[\w-]+@v\d+", step.get("uses", "actions/a@v1")
    )
    key = step.get("with", {}).get("key", "")
    for path in re.findall(r"hashFiles\('(.*?)'\)", key):
      assert (ROOT / path).is_file()


def test_pre_commit_runs_the_ruff_of_make_lint():
  (repo,) = read(".pre-commit-config.yaml")["repos"]
  (ruff,) = (
    needed
    for needed in map(Requirement, PROJECT["optional-dependencies"]["test"])
    if needed.name == "ruff"
  )
  assert ruff.specifier.contains(repo["rev"].removeprefix("v"))
  assert [hook["id"] for hook in repo["hooks"]] == ["ruff-check", "ruff-format"]


def test_citation_and_changelog_are_of_this_version():
  citation = read("CITATION.cff")
  assert citation["version"] == __version__
  assert citation["license"] == PROJECT["license"]
  changes = (ROOT / "CHANGELOG.md").read_text()
  newest = re.search(r"^## (.*)$", changes, re.MULTILINE)[1]
  assert __version__ in newest


def test_a_report_of_a_bug_asks_for_the_versions():
  form = read(".github/ISSUE_TEMPLATE/bug.yml")
  fields = {field["id"]: field for field in form["body"] if "id" in field}
  assert "marlin --version" in fields["versions"]["attributes"]["label"]
  assert fields["versions"]["validations"]["required"]
