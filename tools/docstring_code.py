"""Extension of mkdocs.yml: code in docstrings becomes code on the site.

Code stands two columns to the right of the text, as everything in this project;
Markdown wants four.
"""

import re

import griffe

# The first section; what follows is indented for another reason.
_SECTIONS = re.compile(
  r"^(?:Args|Attributes|Raises|Returns|Yields):$", re.MULTILINE
)


def with_code(text: str) -> str:
  """Returns the text of a docstring, with its code as Markdown has it."""
  section = _SECTIONS.search(text)
  end = section.start() if section else len(text)
  blocks = text[:end].split("\n\n")
  for i, block in enumerate(blocks):
    lines = block.split("\n")
    if all(line.startswith("  ") for line in lines):
      blocks[i] = "\n".join(f"  {line}" for line in lines)
  return "\n\n".join(blocks) + text[end:]


class DocstringCode(griffe.Extension):
  """Applies `with_code` to all docstrings."""

  def on_object(self, *, obj: griffe.Object, **kwargs) -> None:
    if obj.docstring:
      obj.docstring.value = with_code(obj.docstring.value)
