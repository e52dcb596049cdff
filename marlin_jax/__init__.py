"""Masked-autoencoder pretraining on face videos (MARLIN) in JAX.

The features of a video:

  from marlin_jax import Marlin
  marlin = Marlin.from_pretrained("runs/b")
  features = marlin.extract_video("clip.mp4", crop_face=True)
"""

__version__ = "0.1.0"


def __getattr__(name: str):
  # Imported on first use: it takes seconds, and few modules need it.
  if name == "Marlin":
    from marlin_jax.inference.marlin import Marlin

    return Marlin
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
