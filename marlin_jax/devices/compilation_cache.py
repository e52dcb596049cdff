"""Compiled programs that are kept on disk, so that a restart is quick."""

from __future__ import annotations

import jax
from etils import epath

# Folder in a workdir.
FOLDER = "compiled"


def set_up(setting: str, workdir: str) -> None:
  """Tells jax where to keep compiled programs; call it before any is compiled.

  Process 0 writes them; all processes read them. jax's options for it, such as
  JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS, keep their meaning.

  Args:
    setting: a folder, local or gs://; 'auto': that of JAX_COMPILATION_CACHE_DIR
      or, if it is not set, FOLDER in the workdir; '': programs are not kept.
    workdir: workdir of the run.
  """
  if not setting:
    jax.config.update("jax_enable_compilation_cache", False)
  elif setting != "auto":
    jax.config.update("jax_compilation_cache_dir", setting)
  elif not jax.config.jax_compilation_cache_dir:
    folder = epath.Path(workdir) / FOLDER
    jax.config.update("jax_compilation_cache_dir", str(folder))
