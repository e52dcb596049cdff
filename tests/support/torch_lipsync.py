"""Published lip-sync networks in PyTorch, as the reference of parity tests.

Layer tables of github.com/Rudrabha/Wav2Lip, models/ at db7bc44a, with the same
names in state dicts. A row is: input and output channels, kernel, stride,
padding, and 'r' for a residual connection. SyncNet is PyPI's syncnet-python.
"""

import importlib.util
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the test extra has it")
nn, F = torch.nn, torch.nn.functional

SOUND = (
  (1, 32, 3, 1, 1),
  (32, 32, 3, 1, 1, "r"),
  (32, 32, 3, 1, 1, "r"),
  (32, 64, 3, (3, 1), 1),
  (64, 64, 3, 1, 1, "r"),
  (64, 64, 3, 1, 1, "r"),
  (64, 128, 3, 3, 1),
  (128, 128, 3, 1, 1, "r"),
  (128, 128, 3, 1, 1, "r"),
  (128, 256, 3, (3, 2), 1),
  (256, 256, 3, 1, 1, "r"),
  (256, 256, 3, 1, 1, "r"),  # the expert's only
  (256, 512, 3, 1, 0),
  (512, 512, 1, 1, 0),
)
GENERATOR_SOUND = SOUND[:11] + SOUND[12:]
EXPERT_FACE = (
  (15, 32, 7, 1, 3),
  (32, 64, 5, (1, 2), 1),
  (64, 64, 3, 1, 1, "r"),
  (64, 64, 3, 1, 1, "r"),
  (64, 128, 3, 2, 1),
  (128, 128, 3, 1, 1, "r"),
  (128, 128, 3, 1, 1, "r"),
  (128, 128, 3, 1, 1, "r"),
  (128, 256, 3, 2, 1),
  (256, 256, 3, 1, 1, "r"),
  (256, 256, 3, 1, 1, "r"),
  (256, 512, 3, 2, 1),
  (512, 512, 3, 1, 1, "r"),
  (512, 512, 3, 1, 1, "r"),
  (512, 512, 3, 2, 1),
  (512, 512, 3, 1, 0),
  (512, 512, 1, 1, 0),
)
FACE = (
  ((6, 16, 7, 1, 3),),
  ((16, 32, 3, 2, 1), (32, 32, 3, 1, 1, "r"), (32, 32, 3, 1, 1, "r")),
  ((32, 64, 3, 2, 1), *3 * [(64, 64, 3, 1, 1, "r")]),
  ((64, 128, 3, 2, 1), *2 * [(128, 128, 3, 1, 1, "r")]),
  ((128, 256, 3, 2, 1), *2 * [(256, 256, 3, 1, 1, "r")]),
  ((256, 512, 3, 2, 1), (512, 512, 3, 1, 1, "r")),
  ((512, 512, 3, 1, 0), (512, 512, 1, 1, 0)),
)
# 't': transposed, after the output padding.
DECODER = (
  ((512, 512, 1, 1, 0),),
  ((1024, 512, 3, 1, 0, 0, "t"), (512, 512, 3, 1, 1, "r")),
  ((1024, 512, 3, 2, 1, 1, "t"), *2 * [(512, 512, 3, 1, 1, "r")]),
  ((768, 384, 3, 2, 1, 1, "t"), *2 * [(384, 384, 3, 1, 1, "r")]),
  ((512, 256, 3, 2, 1, 1, "t"), *2 * [(256, 256, 3, 1, 1, "r")]),
  ((320, 128, 3, 2, 1, 1, "t"), *2 * [(128, 128, 3, 1, 1, "r")]),
  ((160, 64, 3, 2, 1, 1, "t"), *2 * [(64, 64, 3, 1, 1, "r")]),
)
# Without norm; leaky ReLU.
QUALITY = (
  ((3, 32, 7, 1, 3),),
  ((32, 64, 5, (1, 2), 2), (64, 64, 5, 1, 2)),
  ((64, 128, 5, 2, 2), (128, 128, 5, 1, 2)),
  ((128, 256, 5, 2, 2), (256, 256, 5, 1, 2)),
  ((256, 512, 3, 2, 1), (512, 512, 3, 1, 1)),
  ((512, 512, 3, 2, 1), (512, 512, 3, 1, 1)),
  ((512, 512, 3, 1, 0), (512, 512, 1, 1, 0)),
)


class Layer(nn.Module):
  def __init__(self, *sizes, normed=True):
    super().__init__()
    self.residual = sizes[-1] == "r"
    self.slope = 0.0 if normed else 0.01
    conv = nn.ConvTranspose2d if sizes[-1] == "t" else nn.Conv2d
    sizes = [size for size in sizes if not isinstance(size, str)]
    parts = [conv(*sizes)] + normed * [nn.BatchNorm2d(sizes[1])]
    self.conv_block = nn.Sequential(*parts)

  def forward(self, x):
    y = self.conv_block(x)
    return F.leaky_relu(y + x if self.residual else y, self.slope)


def sequence(table, **layer_args):
  return nn.Sequential(*(Layer(*row, **layer_args) for row in table))


def stages(table, **layer_args):
  return nn.ModuleList(sequence(rows, **layer_args) for rows in table)


class Expert(nn.Module):
  """Lips (B, 15, 48, 96), sound (B, 1, 80, 16) -> unit vectors (B, 512)."""

  def __init__(self):
    super().__init__()
    self.face_encoder = sequence(EXPERT_FACE)
    self.audio_encoder = sequence(SOUND)

  def forward(self, lips, sound):
    return (
      F.normalize(self.face_encoder(lips).flatten(1), dim=1),
      F.normalize(self.audio_encoder(sound).flatten(1), dim=1),
    )


class Wav2Lip(nn.Module):
  """Sound (N, 1, 80, 16), images (N, 6, 96, 96) -> images (N, 3, 96, 96)."""

  def __init__(self):
    super().__init__()
    self.face_encoder_blocks = stages(FACE)
    self.audio_encoder = sequence(GENERATOR_SOUND)
    self.face_decoder_blocks = stages(DECODER)
    self.output_block = nn.Sequential(
      Layer(80, 32, 3, 1, 1), nn.Conv2d(32, 3, 1), nn.Sigmoid()
    )

  def forward(self, sound, x):
    skips = []
    for stage in self.face_encoder_blocks:
      x = stage(x)
      skips.append(x)
    x = self.audio_encoder(sound)
    for stage in self.face_decoder_blocks:
      x = torch.cat([stage(x), skips.pop()], dim=1)
    return self.output_block(x)


class QualityDiscriminator(nn.Module):
  """Lips (N, 3, 48, 96) -> probabilities (N, 1)."""

  def __init__(self):
    super().__init__()
    self.face_encoder_blocks = stages(QUALITY, normed=False)
    self.binary_pred = nn.Sequential(nn.Conv2d(512, 1, 1), nn.Sigmoid())

  def forward(self, x):
    for stage in self.face_encoder_blocks:
      x = stage(x)
    return self.binary_pred(x).flatten(1)


def syncnet():
  """Returns syncnet-python's network without importing its face detectors."""
  package = importlib.util.find_spec("syncnet_python")
  if package is None:
    pytest.skip("pip install --no-deps syncnet-python==0.2.3")
  path = Path(package.submodule_search_locations[0]) / "SyncNetModel.py"
  spec = importlib.util.spec_from_file_location("syncnet_model", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.S()


def with_random_weights(network, seed=0):
  """Randomises weights and statistics; activations stay near size 1.

  Returns:
    The network, in evaluation mode.
  """
  generator = torch.Generator().manual_seed(seed)
  for name, value in network.state_dict().items():
    if name.endswith("num_batches_tracked"):
      continue
    drawn = torch.randn(value.shape, generator=generator)
    if name.endswith("running_var"):
      drawn = 0.5 + torch.rand(value.shape, generator=generator)
    elif value.ndim > 1:
      drawn *= value[0].numel() ** -0.5
    elif name.endswith("weight"):  # a norm's
      drawn = 1 + 0.2 * drawn
    else:
      drawn *= 0.2
    value.copy_(drawn)
  return network.eval()
