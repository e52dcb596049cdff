"""Sample data set: what `data.path = 'sample'` stands for."""

from __future__ import annotations

import subprocess
import sys

from marlin_jax.records import folders, schema
from marlin_jax.records.cli import UserError

NOTICE = """\
data.path is 'sample': one public video of a man who talks, and two videos
without a face. It shows that every part works and that a face appears in the
reconstructions; it is far too little to learn a face representation.
To train on your own videos:
  python -m data_prep.prepare --input VIDEOS --output DATASET
  python -m marlin_jax.train --config=CONFIG --config.data.path=DATASET"""


class SampleError(UserError):
  """Sample data set that could not be prepared."""


def prepare_sample() -> str:
  """Prepares the sample data set, unless it exists.

  data_prep runs as a subprocess: its libraries are not loaded into the trainer,
  and its output appears as it is written.

  Returns:
    The data set's folder.

  Raises:
    SampleError: the preparation failed; it has printed the reason.
  """
  # Both versions are part of the name: an older version of this code still
  # finds its own data set, and this one does not train on old crops.
  versions = f"{schema.SCHEMA_VERSION}.{schema.ALGORITHM_VERSION}"
  folder = folders.cache_home() / f"sample-v{versions}"
  if not (folder / folders.DATASET_INFO).exists():
    print(f"Preparing the sample data set in {folder} ...", flush=True)
    command = [sys.executable, "-m", "data_prep.prepare"]
    command += ["--input", "sample", "--output", str(folder)]
    if subprocess.run(command, check=False).returncode:
      raise SampleError(
        "the sample data set could not be prepared, see above. To repeat the "
        f"message, run: {' '.join(command)}"
      )
  return str(folder)
