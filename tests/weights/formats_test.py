"""Weights in every format: round trips and refused files."""

import dataclasses
import json
import pickle
import socketserver
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from marlin_jax import convert
from marlin_jax.inference.marlin import Marlin
from marlin_jax.weights import (
  formats,
  huggingface,
  marlin_pytorch,
  run_checkpoint,
  safetensors_folder,
  videomae,
)
from marlin_jax.weights.architecture import Architecture
from marlin_jax.weights.weights import Weights, WeightsError, encoder_sha256
from tests.support import authors

TINY = Architecture(
  width=32,
  depth=2,
  num_heads=4,
  mlp_dim=64,
  dec_width=16,
  dec_depth=1,
  dec_num_heads=2,
  dec_mlp_dim=32,
  disc_hidden=24,
)
HEADS = {"num_heads": 4, "dec_num_heads": 2}


@pytest.fixture(scope="module")
def weights():
  np_rng = np.random.default_rng(0)
  arrays = {
    name: np_rng.normal(size=shape).astype(np.float32) * 0.1
    for name, shape in TINY.shapes().items()
  }
  # As trained here, and as every format can store.
  return Weights(TINY, arrays | videomae.position_tables(TINY))


@pytest.fixture(scope="module")
def clips():
  return np.random.default_rng(1).integers(
    0, 256, (1, 16, 224, 224, 3), np.uint8
  )


def assert_same(got: Weights, want: Weights):
  assert got.architecture == want.architecture
  assert got.arrays.keys() == want.arrays.keys()
  for name, array in want.arrays.items():
    np.testing.assert_array_equal(got.arrays[name], array, err_msg=name)


# --- Round trips --------------------------------------------------------------


def test_a_safetensors_folder_gives_the_same_bits(weights, tmp_path):
  safetensors_folder.write(weights, tmp_path / "a")
  assert_same(formats.read(tmp_path / "a"), weights)


def test_a_runs_checkpoint_gives_the_same_bits(weights, tmp_path):
  run_checkpoint.write(weights, tmp_path / "a")
  assert_same(formats.read(tmp_path / "a"), weights)
  assert_same(formats.read(tmp_path / "a" / "checkpoints" / "0"), weights)


def test_the_authors_files_give_the_same_bits(weights, tmp_path):
  for name, want in (
    ("a.ckpt", weights),
    ("a.full.pt", weights.without_discriminator()),
    ("a.encoder.pt", weights.encoder_only()),
  ):
    marlin_pytorch.write(weights, tmp_path / name)
    assert_same(formats.read(tmp_path / name, **HEADS), want)


def test_videomae_files_give_the_same_bits(weights, tmp_path):
  architecture = dataclasses.replace(
    TINY, disc_hidden=0, norm_pix=True, imagenet_input=True, norm_eps=1e-6
  )
  arrays = weights.without_discriminator().arrays
  theirs = Weights(architecture, arrays)
  assert not videomae.write(theirs, tmp_path / "a.pth")
  assert_same(formats.read(tmp_path / "a.pth", **HEADS), theirs)
  assert not huggingface.write(theirs, tmp_path / "hf")
  assert_same(formats.read(tmp_path / "hf"), theirs)


def test_other_sizes_survive_in_every_format(tmp_path):
  """112 pixels in patches of 8."""
  architecture = dataclasses.replace(
    TINY, image_size=112, patch_size=8, num_frames=4, norm_eps=1e-6
  )
  np_rng = np.random.default_rng(0)
  arrays = {
    name: np_rng.normal(size=shape).astype(np.float32) * 0.1
    for name, shape in architecture.shapes().items()
  }
  ours = Weights(architecture, arrays | videomae.position_tables(architecture))
  encoder = ours.encoder_only()
  size = {"image_size": 112}
  marlin_pytorch.write(ours, tmp_path / "a.full.pt")
  read = formats.read(tmp_path / "a.full.pt", **HEADS, **size)
  assert read.architecture == dataclasses.replace(
    architecture, disc_hidden=0, norm_eps=1e-5
  )
  safetensors_folder.write(ours, tmp_path / "folder")
  assert_same(formats.read(tmp_path / "folder"), ours)
  run_checkpoint.write(ours, tmp_path / "run")
  assert formats.read(tmp_path / "run").architecture == dataclasses.replace(
    architecture, norm_eps=1e-5
  )
  theirs = encoder.with_imagenet_input()
  videomae.write(ours.without_discriminator(), tmp_path / "a.pth")
  read = formats.read(tmp_path / "a.pth", **HEADS, **size, num_frames=4)
  assert read.architecture.tubelets == architecture.tubelets
  huggingface.write(theirs, tmp_path / "hf")
  assert_same(formats.read(tmp_path / "hf"), theirs)
  config = json.loads((tmp_path / "hf" / "config.json").read_text())
  assert (config["image_size"], config["patch_size"]) == (112, 8)


def test_the_authors_package_opens_what_is_written(weights, tmp_path):
  """Opens files with its own `from_file`, for the published sizes only."""
  architecture = Architecture(
    384,
    12,
    6,
    1536,
    dec_width=192,
    dec_depth=4,
    dec_num_heads=3,
    dec_mlp_dim=768,
    disc_hidden=768,
  )
  zeros = {k: np.zeros(s, np.float32) for k, s in architecture.shapes().items()}
  for name in ("a.ckpt", "a.full.pt", "a.encoder.pt"):
    marlin_pytorch.write(Weights(architecture, zeros), tmp_path / name)
    model = authors.open_file("marlin_vit_small_ytf", tmp_path / name)
    assert (model.decoder is None) == (name == "a.encoder.pt")


def test_the_hash_of_an_encoder_stays():
  """Workdirs, kept models and feature folders of before hold it.

  A field that is added to Architecture belongs to _NOT_HASHED_BY_DEFAULT.
  """
  architecture = Architecture(
    width=8, depth=1, num_heads=2, mlp_dim=16, num_frames=4, patch_size=56
  )
  arrays = {
    name: np.full(shape, 0.5, np.float32)
    for name, shape in architecture.shapes().items()
  }
  assert encoder_sha256(Weights(architecture, arrays)) == (
    "33dff6137ffbb104b11243f9305defad61456ca6f2e09902a185616315cd6fd6"
  )


def test_folding_the_input_changes_rounding_only(weights, clips):
  want = Marlin(weights).extract_features(clips, keep_seq=True)
  folded = weights.with_imagenet_input()
  assert folded.architecture.imagenet_input
  got = Marlin(folded).extract_features(clips, keep_seq=True)
  np.testing.assert_allclose(got, want, atol=1e-4)
  back = folded.with_plain_input()
  for name, array in weights.arrays.items():
    np.testing.assert_allclose(back.arrays[name], array, rtol=1e-5, atol=1e-6)


def test_transformers_eps_is_read_and_kept(weights, clips, tmp_path):
  """Published VideoMAE folders have 1e-12."""
  transformers = pytest.importorskip("transformers")
  kind = transformers.VideoMAEModel
  # Small inputs, for which epsilon matters.
  arrays = dict(weights.encoder_only().arrays)
  for name in ("patch_embedding.kernel", "patch_embedding.bias", "positions"):
    arrays[f"encoder.{name}"] = arrays[f"encoder.{name}"] * np.float32(1e-3)
  quiet = Weights(TINY.without_decoder(), arrays)
  huggingface.write(quiet, tmp_path / "a")
  config = safetensors_folder.read_config(tmp_path / "a")
  safetensors_folder.save_config(
    config | {"layer_norm_eps": 1e-12}, tmp_path / "a"
  )
  got = formats.read(tmp_path / "a")
  assert got.architecture.norm_eps == 1e-12
  model = kind.from_pretrained(tmp_path / "a").eval()
  model.embeddings.position_embeddings *= 1e-3
  video = torch.from_numpy(clips.astype(np.float32) / 255)
  with torch.no_grad():
    want = model(video.permute(0, 1, 4, 2, 3)).last_hidden_state.numpy()
  # Both sides compute the position tables anew.
  got.arrays["encoder.positions"] = quiet.arrays["encoder.positions"]
  features = Marlin(got).extract_features(clips, keep_seq=True)
  np.testing.assert_allclose(features, want, atol=1e-4)
  other = Weights(
    dataclasses.replace(got.architecture, norm_eps=1e-5), got.arrays
  )
  features = Marlin(other).extract_features(clips, keep_seq=True)
  assert np.abs(features - want).max() > 1e-3


@pytest.mark.parametrize("kind", huggingface.CLASSES)
@pytest.mark.parametrize("fold_input", [False, True])
def test_transformers_computes_the_same(
  weights, clips, tmp_path, kind, fold_input
):
  transformers = pytest.importorskip("transformers")
  huggingface.write(weights, tmp_path, kind=kind, fold_input=fold_input)
  model = getattr(transformers, kind).from_pretrained(tmp_path).eval()
  video = torch.from_numpy(clips.astype(np.float32) / 255)
  if fold_input:
    mean = torch.tensor([0.485, 0.456, 0.406])
    video = (video - mean) / torch.tensor([0.229, 0.224, 0.225])
  video = video.permute(0, 1, 4, 2, 3)
  ours = Marlin(weights)
  with torch.no_grad():
    if kind == "VideoMAEForVideoClassification":
      got = model(video).logits
      want = ours.extract_features(clips)
    else:
      encoder = getattr(model, "videomae", model)
      got = encoder(video).last_hidden_state
      want = ours.extract_features(clips, keep_seq=True)
  np.testing.assert_allclose(got.numpy(), want, atol=1e-4)


def test_transformers_loss_is_the_authors(weights, clips, tmp_path):
  transformers = pytest.importorskip("transformers")
  huggingface.write(weights, tmp_path, fold_input=True)
  model = transformers.VideoMAEForPreTraining.from_pretrained(tmp_path).eval()
  visible = np.random.default_rng(2).permutation(1568) < 156
  video = clips.astype(np.float32) / 255
  mean = np.float32([0.485, 0.456, 0.406])
  std = np.float32([0.229, 0.224, 0.225])
  normalised = torch.from_numpy((video - mean) / std).permute(0, 1, 4, 2, 3)
  with torch.no_grad():
    got = model(normalised, bool_masked_pos=torch.from_numpy(~visible)[None])
    pred = authors.network(weights.without_discriminator())(
      authors.clips(video), torch.from_numpy(visible)[None]
    )
  target = TINY.tubelets.patchify(video)[:, ~visible]
  want = np.square(pred.numpy() - target).mean()
  np.testing.assert_allclose(float(got.loss), want, rtol=1e-5)


def test_what_the_decoder_of_a_videomae_file_predicts_is_told(
  weights, tmp_path
):
  """MARLIN's predicts pixels, VideoMAE's normalised ones."""
  lacking = [
    "the decoder predicts"
    in " ".join(videomae.write(written, tmp_path / "a.pth"))
    for written in (
      weights,
      weights.encoder_only(),
      dataclasses.replace(
        weights, architecture=dataclasses.replace(TINY, norm_pix=True)
      ),
    )
  ]
  assert lacking == [True, False, False]
  assert formats.read(tmp_path / "a.pth", **HEADS).architecture.norm_pix


# --- Refused files ------------------------------------------------------------


@pytest.mark.parametrize(
  ("change", "named"),
  [
    (lambda s: s.pop("encoder.norm.bias"), "encoder.norm.bias: missing"),
    (lambda s: s.update(extra=torch.zeros(2)), "extra: not known"),
    (
      lambda s: s.update({"encoder.blocks.gain": torch.zeros(2)}),
      "encoder.blocks.gain: not known",
    ),
    (
      lambda s: s.update({"encoder.norm.gain": s.pop("encoder.norm.weight")}),
      "encoder.norm.gain: not known",
    ),
    (
      lambda s: s.update({"encoder.norm.bias": torch.zeros(5)}),
      r"encoder.norm.bias: shape \(5,\), expected \(32,\)",
    ),
    (
      lambda s: s.update({"encoder.norm.bias": torch.zeros(32).int()}),
      "floating-point tensors only; these are not: encoder.norm.bias",
    ),
  ],
  ids=["dropped", "added", "among blocks", "renamed", "shape", "dtype"],
)
def test_a_wrong_key_is_named(weights, tmp_path, change, named):
  path = tmp_path / "a.full.pt"
  marlin_pytorch.write(weights, path)
  state = torch.load(path)
  change(state)
  torch.save(state, path)
  with pytest.raises(WeightsError, match=named):
    formats.read(path, **HEADS)


def test_a_wrong_key_in_safetensors_is_named(weights, tmp_path):
  for name, write in (
    ("a", safetensors_folder.write),
    ("b", huggingface.write),
  ):
    write(weights, tmp_path / name)
    path = tmp_path / name / safetensors_folder.ARRAYS
    arrays = safetensors.numpy.load_file(path)
    arrays["extra"] = arrays.pop(sorted(arrays)[0])
    safetensors.numpy.save_file(arrays, path)
    with pytest.raises(WeightsError, match=r"missing(.|\n)*extra: not known"):
      formats.read(tmp_path / name)


@pytest.mark.parametrize(
  ("name", "unit"),
  [
    ("width", "num_heads"),
    ("dec_width", "dec_num_heads"),
    ("num_frames", "tubelet_size"),
    ("image_size", "patch_size"),
  ],
)
def test_sizes_that_do_not_divide_are_refused(weights, name, unit):
  size = getattr(weights.architecture, name)
  for divisor in (0, -1, 7 if size % 7 else 9):
    wrong = dataclasses.replace(weights.architecture, **{unit: divisor})
    words = f"{name}={size}: expected a multiple of {unit}={divisor}"
    with pytest.raises(WeightsError, match=words):
      Weights(wrong, weights.arrays)


class Malicious:
  def __reduce__(self):
    return Path.touch, (Path("was_here"),)


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.pth"])
@pytest.mark.parametrize("save", [torch.save, pickle.dump])
def test_a_malicious_pickle_is_refused(tmp_path, monkeypatch, name, save):
  monkeypatch.chdir(tmp_path)
  with (tmp_path / name).open("wb") as file:
    save({"state_dict": {"w": Malicious()}}, file)
  with pytest.raises(WeightsError, match="refused"):
    formats.read(tmp_path / name)
  assert not Path("was_here").exists()


def test_a_pointer_of_git_lfs_is_named(tmp_path):
  file = tmp_path / "a.pth"
  file.write_text("version https://git-lfs.github.com/spec/v1\nsize 376\n")
  with pytest.raises(WeightsError, match="is a Git LFS pointer"):
    formats.read(file)


def test_a_file_of_another_kind_is_told_by_its_beginning(tmp_path):
  file = tmp_path / "a.pth"
  file.write_text("<!DOCTYPE html>")
  with pytest.raises(WeightsError, match="no file of PyTorch, .*<!DOCTYPE"):
    formats.read(file)


def test_what_a_file_would_run_is_named(tmp_path):
  file = tmp_path / "a.pth"
  torch.save({"model": {"a": torch.zeros(1)}, "best": np.float64(1)}, file)
  with pytest.raises(WeightsError, match=r"run numpy.*scalar") as error:
    formats.read(file)
  assert "\x1b" not in str(error.value)


@pytest.mark.parametrize("name", ["a.pt", "a.pth"])
def test_a_damaged_file_is_refused(weights, tmp_path, name):
  (marlin_pytorch if name == "a.pt" else videomae).write(
    weights, tmp_path / name
  )
  data = (tmp_path / name).read_bytes()
  (tmp_path / name).write_bytes(data[: len(data) // 2])
  with pytest.raises(WeightsError, match="cannot be read"):
    formats.read(tmp_path / name)


def test_what_is_no_weights_is_refused(tmp_path):
  with pytest.raises(WeightsError, match="no such file"):
    formats.read(tmp_path / "nothing")
  with pytest.raises(WeightsError, match=f"{tmp_path} has an unknown format"):
    formats.read(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(WeightsError, match=r"config\.json"):
    formats.read(tmp_path)


def test_unknown_sizes_are_asked_for(weights, tmp_path):
  marlin_pytorch.write(weights, tmp_path / "a.pt")
  with pytest.raises(WeightsError, match="convert --num_heads"):
    formats.read(tmp_path / "a.pt")
  with pytest.raises(WeightsError, match="--num_frames has no meaning"):
    formats.read(tmp_path / "a.pt", **HEADS, num_frames=16)


def test_a_classifier_stays_behind_only_when_told_to(weights, tmp_path):
  huggingface.write(weights, tmp_path, kind="VideoMAEForVideoClassification")
  path = tmp_path / safetensors_folder.ARRAYS
  arrays = safetensors.numpy.load_file(path)
  arrays["classifier.weight"] = np.zeros((3, 32), np.float32)
  safetensors.numpy.save_file(arrays, path)
  with pytest.raises(WeightsError, match="convert --drop_classifier"):
    formats.read(tmp_path)
  got = formats.read(tmp_path, drop_classifier=True)
  assert_same(got, weights.encoder_only())


def test_a_published_name_without_a_network_says_where_to_put_the_file(
  tmp_path, monkeypatch
):
  monkeypatch.setenv("MARLIN_HOME", str(tmp_path))
  # No server listens on this port.
  monkeypatch.setattr(formats, "_ADDRESS", "http://127.0.0.1:9/")
  with pytest.raises(WeightsError) as error:
    formats.resolve("marlin_vit_base_ytf")
  path = tmp_path / "models" / "marlin_vit_base_ytf.encoder.pt"
  assert str(path) in str(error.value)
  assert "http://127.0.0.1:9/marlin_vit_base_ytf.encoder.pt" in str(error.value)
  path.write_bytes(b"put there by hand")
  assert formats.resolve("marlin_vit_base_ytf") == path
  with pytest.raises(WeightsError, match="nor one of the published"):
    formats.resolve("marlin_vit_huge")


@pytest.mark.parametrize(
  "answer",
  [b"nonsense\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nshort"],
)
def test_a_download_that_breaks_off_is_one_error_and_no_file(
  tmp_path, monkeypatch, answer
):
  class Handler(socketserver.StreamRequestHandler):
    def handle(self):
      self.rfile.readline()
      self.wfile.write(answer)

  monkeypatch.setenv("MARLIN_HOME", str(tmp_path))
  with socketserver.TCPServer(("127.0.0.1", 0), Handler) as server:
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    port = server.server_address[1]
    monkeypatch.setattr(formats, "_ADDRESS", f"http://127.0.0.1:{port}/")
    with pytest.raises(WeightsError, match="could not be downloaded"):
      formats.resolve("marlin_vit_base_ytf")
    thread.join()
  assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_what_marlin_pytorch_has_downloaded_is_used(tmp_path, monkeypatch):
  monkeypatch.setenv("MARLIN_HOME", str(tmp_path / "home"))
  monkeypatch.setattr(formats, "_ADDRESS", "http://127.0.0.1:9/")
  monkeypatch.chdir(tmp_path)
  file = tmp_path / ".marlin" / "marlin_vit_base_ytf.full.pt"
  file.parent.mkdir()
  file.write_bytes(b"theirs")
  assert formats.resolve("marlin_vit_base_ytf", full=True).samefile(file)
  with pytest.raises(WeightsError, match="could not be downloaded"):
    formats.resolve("marlin_vit_base_ytf", full=False)


# --- The command --------------------------------------------------------------


def run_convert(*args):
  assert convert.main([str(arg) for arg in args]) == 0


def refused(capsys, *args):
  """Returns the message of a conversion that fails."""
  assert convert.main([str(arg) for arg in args]) == 1
  return capsys.readouterr().err


def test_convert_goes_round_and_checks(weights, carphone, tmp_path, capsys):
  safetensors_folder.write(weights, tmp_path / "a")
  clip = ("--clip", carphone(tmp_path / "clip.mp4", 32))
  heads = ("--num_heads", 4, "--dec_num_heads", 2)
  run_convert("--to=marlin", tmp_path / "a", tmp_path / "b.ckpt", *clip)
  run_convert(tmp_path / "b.ckpt", tmp_path / "c", *heads, *clip)
  assert_same(safetensors_folder.read(tmp_path / "c"), weights)
  printed = capsys.readouterr().out
  assert "JAX against PyTorch" in printed
  assert "exists" in refused(capsys, tmp_path / "a", tmp_path / "c", *clip)


@pytest.mark.parametrize(
  "name", ["a/notes.txt", "a/checkpoints/100/x", "a.txt"]
)
def test_only_results_of_a_conversion_are_overwritten(tmp_path, name):
  source, file = tmp_path / "source", tmp_path / name
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text("of the user")
  target = tmp_path / name.split("/")[0]
  with (
    pytest.raises(WeightsError, match="choose another name"),
    convert._in_place_of(target, source, overwrite=True),
  ):
    raise AssertionError
  assert file.read_text() == "of the user"


def test_a_disk_that_is_full_is_one_error_and_no_half_file(
  weights, tmp_path, monkeypatch
):
  def full(*_, **__):
    raise safetensors.SafetensorError("No space left on device")

  monkeypatch.setattr(safetensors.numpy, "save_file", full)
  with pytest.raises(WeightsError, match="cannot be written: No space"):
    safetensors_folder.write(weights, tmp_path / "a")
  assert not [*(tmp_path / "a").iterdir()]


def test_results_of_a_conversion_are_overwritten(weights, tmp_path):
  target = tmp_path / "a"
  for write in (safetensors_folder.write, run_checkpoint.write):
    with convert._in_place_of(target, tmp_path / "b", overwrite=True):
      assert not target.exists()
      write(weights, target)
  assert formats.format_of(target) == "orbax"
  assert [*tmp_path.iterdir()] == [target]


@pytest.mark.parametrize(
  ("options", "problem"),
  [
    (("--to=safetensors", "--fold_input"), "--fold_input has no meaning"),
    (("--to=orbax", "--encoder_only"), "has no decoder"),
    (("--to=videomae",), "VideoMAE's files end in .pth"),
  ],
)
def test_a_conversion_that_cannot_be_written_leaves_the_one_before(
  weights, tmp_path, capsys, options, problem
):
  source, target = tmp_path / "a", tmp_path / "b"
  for path in (source, target):
    safetensors_folder.write(weights, path)
  assert problem in refused(capsys, "--overwrite", *options, source, target)
  assert_same(safetensors_folder.read(target), weights)
  assert {*tmp_path.iterdir()} == {source, target}


def test_convert_refuses_a_format_that_it_does_not_know(
  weights, tmp_path, capsys
):
  safetensors_folder.write(weights, tmp_path / "a")
  for flag in ("--from=pickle", "--to=pickle"):
    message = refused(capsys, flag, tmp_path / "a", tmp_path / "b")
    assert "expected one of safetensors, marlin" in message
  assert "a local or network disk" in refused(
    capsys, tmp_path / "a", "gs://bucket/b"
  )
  assert not (tmp_path / "b").exists()


def test_a_conversion_that_went_wrong_fails_its_check(weights, clips, tmp_path):
  wrong = weights.arrays | {"head.bias": weights.arrays["head.bias"] + 1e-3}
  marlin_pytorch.write(weights, tmp_path / "a.ckpt")
  with pytest.raises(WeightsError, match="the check failed"):
    convert.check(
      (tmp_path / "a.ckpt", "marlin", weights),
      (tmp_path / "b", "safetensors", Weights(TINY, wrong)),
      clips,
    )
