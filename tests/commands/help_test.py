"""Every command explains itself, quickly and without data."""

import subprocess
import sys

import pytest

from tests.layout_test import COMMANDS
from tests.support.processes import ROOT


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
  result = subprocess.run(
    [sys.executable, "-m", command, "--help"],
    capture_output=True,
    text=True,
    cwd=ROOT,
    check=False,
    timeout=60,
  )
  assert result.returncode == 0, result.stderr
  text = result.stdout + result.stderr
  assert "Traceback" not in text
  assert len(text.splitlines()) > 5
