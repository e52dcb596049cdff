"""The tables of rules are complete and list what the networks offer."""

import inspect
import itertools
import re

import pytest

from configs import eval_far, eval_ls, pretrain_b
from marlin_jax.eval import configuration as eval_configuration
from marlin_jax.lipsync import configuration as lipsync_configuration
from marlin_jax.models import options, softmax_attention, vit
from marlin_jax.pretraining import configuration as pretraining_configuration
from marlin_jax.training.configuration import (
  ConfigError,
  check_attention,
  flat,
)


@pytest.mark.parametrize(
  ("config", "family"),
  [
    (pretrain_b, pretraining_configuration),
    (eval_far, eval_configuration),
    (eval_ls, lipsync_configuration),
  ],
)
def test_every_key_has_a_rule_and_every_rule_a_key(config, family):
  assert flat(config.get_config()).keys() == family.KEYS.keys()


@pytest.mark.parametrize(
  ("config", "family", "words"),
  [
    (pretrain_b, eval_configuration, "tasks is missing\n"),
    (eval_far, pretraining_configuration, "and [0-9]+ more\nexpected"),
    (eval_far, lipsync_configuration, "not the keys of this command"),
  ],
)
def test_the_configuration_of_another_command_is_refused(config, family, words):
  with pytest.raises(ConfigError, match=words):
    family.validate(config.get_config())


def test_a_misspelt_key_in_a_file_is_refused():
  config = pretrain_b.get_config()
  config.optim.base_rl = 1e-3
  with pytest.raises(ConfigError, match="rl is no key, expected optim.base_lr"):
    pretraining_configuration.validate(config)


@pytest.mark.parametrize("config", [pretrain_b, eval_far, eval_ls])
def test_every_key_is_explained_above_it(config):
  source = inspect.getsource(config.get_config).splitlines()
  num_keys = 0
  for above, line in itertools.pairwise(source):
    if re.match(r"  config\.\S+ = (?!ConfigDict)", line):
      num_keys += 1
      assert above.startswith("  # "), line
  assert num_keys == len(flat(config.get_config()))


def test_every_rematerialisation_is_one_of_the_networks():
  assert ("none", *vit.REMAT_POLICIES) == options.REMAT


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("dtype", options.DTYPES)
def test_auto_stands_for_an_attention_of_the_table(platform, dtype):
  chosen = softmax_attention.choose("auto", platform, dtype)
  assert chosen in set(options.ATTENTION) - {"auto"}


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("dtype", options.DTYPES)
def test_what_auto_chooses_runs_there(platform, dtype):
  chosen = softmax_attention.choose("auto", platform, dtype)
  check_attention(chosen, platform, dtype)


def test_cudnns_attention_without_bfloat16_is_refused():
  with pytest.raises(ConfigError, match="'cudnn' needs dtype='bfloat16'"):
    check_attention("cudnn", "gpu", "float32")
