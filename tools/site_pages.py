"""Hook of mkdocs.yml: files of the top folder become pages of the site."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

# File -> page.
PAGES = {
  "README.md": "index.md",
  "CONTRIBUTING.md": "CONTRIBUTING.md",
  "CHANGELOG.md": "CHANGELOG.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
  """Adds the pages, with links that hold in the folder of the others."""
  root = Path(config.config_file_path).parent
  for name, page in PAGES.items():
    text = (root / name).read_text().replace("](docs/", "](")
    files.append(File.generated(config, page, content=text))
  return files
