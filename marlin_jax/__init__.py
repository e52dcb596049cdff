"""Masked-autoencoder pretraining on face videos (MARLIN) in JAX.

from marlin_jax import Marlin
features = Marlin.from_pretrained(PATH).extract_video("clip.mp4")
"""

__version__ = "0.1.0"


def __getattr__(name: str):
  # Imported on first use: it takes seconds, and few modules need it.
  if name == "Marlin":
    from marlin_jax.inference.marlin import Marlin

    return Marlin
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
