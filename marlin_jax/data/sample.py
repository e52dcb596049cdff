"""The sample video, and the data set behind `data.path = 'sample'`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from marlin_jax.records import folders, schema
from marlin_jax.records.cli import UserError

NOTICE = """\
data.path is 'sample': one public video of a talking man (and two without a
face, to show what happens to those). It is real, and enough to see every part
work and a face appear; far too little to learn a face representation from.
To train on your own videos:
  python -m data_prep.prepare --input VIDEOS --output DATASET
  python -m marlin_jax.train --config=CONFIG --config.data.path=DATASET"""


class SampleError(UserError):
  """The sample data set could not be prepared."""


def fetch_video() -> Path:
  """The sample video of a talking man, 176x144, downloaded on first use.

  Raises:
    SampleError: it could not be had.
  """
  from data_prep import assets

  try:
    return assets.fetch_sample_videos() / "carphone_pristine.mp4"
  except assets.AssetError as e:
    raise SampleError(str(e)) from e


def prepare_sample() -> str:
  """Prepares the sample data set on first use.

  The offline stage runs in a process of its own: its libraries never enter the
  trainer, and what it prints is seen as it comes. When all is there it returns
  at once.

  Returns:
    The data set's directory.

  Raises:
    SampleError: the stage failed; it has said why.
  """
  # An older version's data set stays where that version looks for it.
  directory = folders.cache_home() / f"sample-v{schema.SCHEMA_VERSION}"
  if not (directory / folders.DATASET_INFO).exists():
    print(f"Preparing the sample data set in {directory} ...", flush=True)
    command = [sys.executable, "-m", "data_prep.prepare"]
    command += ["--input", "sample", "--output", str(directory)]
    if subprocess.run(command, check=False).returncode:
      raise SampleError(
        f"the sample data set could not be prepared, see above. "
        f"To see it again: {' '.join(command)}"
      )
  return str(directory)
