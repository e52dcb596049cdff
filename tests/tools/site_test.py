"""The documentation site: built without a warning, whole, self-contained."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest

from tests.support.processes import ROOT

pytestmark = pytest.mark.skipif(
  not all(
    map(importlib.util.find_spec, ("mkdocs", "material", "mkdocstrings"))
  ),
  reason="needs the extra docs",
)


def test_code_in_docstrings_is_indented_as_markdown_wants_it():
  from tools.docstring_code import with_code

  text = "Does it.\n\n  f(1)\n  f(2)\n\nText.\n\nArgs:\n  x: number.\n\n  More."
  assert with_code(text) == text.replace("  f(", "    f(")
  assert with_code("Does it.\n\nText.") == "Does it.\n\nText."


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
  site = tmp_path / "site"
  arguments = ["--config-file", ROOT / "mkdocs.yml", "--site-dir", site]
  result = subprocess.run(
    [sys.executable, "-m", "mkdocs", "build", "--strict", *arguments],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    check=False,
  )
  assert result.returncode == 0, result.stderr

  # --- Pages ------------------------------------------------------------------
  for guide in (ROOT / "docs").glob("*.md"):
    assert (site / f"{guide.stem}.html").is_file()
  assert "masked autoencoder" in (site / "index.html").read_text()
  marlin = (site / "api" / "marlin.html").read_text()
  assert 'id="marlin_jax.inference.marlin.Marlin.extract_video"' in marlin
  assert "(W, N, D)" in marlin
  # Sections of docstrings are tables, not text.
  for page in (site / "api").glob("*.html"):
    text = page.read_text()
    assert not re.search(r"<p>(Args|Returns|Raises|Attributes):", text), page

  # --- Nothing from other hosts -----------------------------------------------
  for page in site.rglob("*.html"):
    loaded = re.findall(
      r'<(?:script|img|link)[^>]+(?:src|href)="(https?:[^"]+)"',
      page.read_text(),
    )
    assert not loaded, page
