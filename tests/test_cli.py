"""Flags in, one clear line and an exit code out."""

import pytest

from simclr_jax import cli, errors
from simclr_jax.config import UserError


def parse(*argv, stage="pretrain"):
  return cli.parse(list(argv), stage=stage)


@pytest.mark.parametrize(
  "config",
  [
    "digits",
    "pretrain.py:digits",
    "configs/pretrain.py:digits",
    "simclr_jax/configs/pretrain.py:digits",
  ],
)
def test_recipes_are_found_from_any_folder(config, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  parsed, workdir = parse(f"--config={config}", "--workdir=w")
  assert parsed.recipe == "digits"
  assert parsed.is_locked
  assert workdir == "w"


def test_fields_are_typed_by_the_recipe():
  config, _ = parse(
    "--config=digits",
    "--workdir",
    "w",
    "--config.batch_size=64",
    "--config.optim.learning_rate=1",
    "--config.augment.area_range=(0.5, 1.0)",
    "--config.probe=false",
  )
  assert config.batch_size == 64
  assert isinstance(config.optim.learning_rate, float)
  assert config.augment.area_range == (0.5, 1.0)
  assert config.probe is False


def test_a_stage_that_is_none():
  with pytest.raises(UserError, match='stage is "nope"; expected one of pretr'):
    cli.load_recipe("digits", stage="nope")


def test_a_recipe_of_ones_own(tmp_path):
  file = tmp_path / "mine.py"
  file.write_text(
    "import ml_collections\n"
    "def get_config():\n"
    "  return ml_collections.ConfigDict(dict(stage='pretrain', x=1))\n"
  )
  config, _ = parse(f"--config={file}", "--workdir=w", "--config.x=2")
  assert config.x == 2


@pytest.mark.parametrize(
  "argv, message",
  [
    (["--workdir=w"], "--config is missing; for example: python -m"),
    (["--config=digits"], "--workdir is missing"),
    (["--config=digis", "--workdir=w"], 'did you mean "digits"?'),
    (["--config=no.py:digits", "--workdir=w"], "there is no file no.py"),
    (["--config=my/pretrain.py:digits", "--workdir=w"], "no file my/pretrain"),
    (["--config=zzz", "--workdir=w"], 'unknown recipe "zzz". Recipes: '),
    (
      ["--config=finetune.py:digits", "--workdir=w"],
      "is for simclr_jax.finetune, this is simclr_jax.pretrain",
    ),
    (
      ["--config=digits", "--workdir=w", "--config.optim.larning_rate=1"],
      'did you mean "optim.learning_rate"?',
    ),
    (
      ["--config=digits", "--workdir=w", "--config.batch_size=many"],
      "batch_size",
    ),
    (["--config=digits", "--wrkdir=w"], 'did you mean "workdir"?'),
    (["digits", "--workdir=w"], '"digits" is not a flag'),
  ],
)
def test_mistakes_get_one_line(argv, message):
  with pytest.raises(UserError) as error:
    parse(*argv)
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_exit_codes(capsys, tmp_path):
  argv = ["--config=digits", f"--workdir={tmp_path}"]

  def fail(config, workdir):
    raise UserError("config.seed is bad.")

  with pytest.raises(SystemExit) as stop:
    cli.run(fail, stage="pretrain", argv=argv)
  assert stop.value.code == 2
  assert capsys.readouterr().err == "error: config.seed is bad.\n"

  def fault(config, workdir):
    raise RuntimeError("a fault keeps its traceback")

  with pytest.raises(RuntimeError):
    cli.run(fault, stage="pretrain", argv=argv)

  def train(config, workdir):
    return {"top1": 0.5, "top5": None, "protocol": "knn"}

  cli.run(train, stage="pretrain", argv=argv)
  assert "pretrain (knn): top1 50.00%" in capsys.readouterr().out


def test_an_error_is_one_line_whatever_it_quotes(capsys):
  with pytest.raises(SystemExit), errors.ending():
    raise UserError('config.optim.name must be lars; got "a\nb"')
  error = capsys.readouterr().err
  assert error == 'error: config.optim.name must be lars; got "a b"\n'


@pytest.mark.parametrize("name", ["stage", "recipe"])
def test_what_the_recipe_says_is_no_flag(name):
  with pytest.raises(UserError, match=rf"config.{name} cannot be given; it is"):
    parse("--config=digits", "--workdir=x", f"--config.{name}=folder")


def test_help_names_the_recipes_file(capsys):
  with pytest.raises(SystemExit) as stop:
    parse("--help")
  assert stop.value.code == 0
  assert "configs/pretrain.py" in capsys.readouterr().out


def test_setup_keeps_short_compilations_too(monkeypatch):
  name = "jax_persistent_cache_min_compile_time_secs"
  monkeypatch.setattr(cli.cpu_backend, "is_expected", lambda: False)
  monkeypatch.setattr(cli.hosts, "initialize", lambda: None)
  monkeypatch.delenv(name.upper(), raising=False)
  found = {}
  monkeypatch.setattr(cli.jax.config, "update", found.__setitem__)
  cli.setup()
  assert found[name] == 0.1
  found.clear()
  monkeypatch.setenv(name.upper(), "2")  # JAX reads it when it is imported
  cli.setup()
  assert name not in found


@pytest.mark.parametrize(
  "text, message",
  [
    ("def get_config(:", "mine.py: SyntaxError: invalid syntax"),
    ("a = 1", "AttributeError: module 'recipes' has no attribute 'get_config'"),
    ("def get_config():\n  pass", "mine.py: TypeError: get_config() takes 0"),
    ("def get_config(arg):\n  return {'a': 1}", "mine.py: AttributeError: 'd"),
    (
      "import ml_collections\ndef get_config(arg):\n"
      "  return ml_collections.ConfigDict({'stage': 'x'})",
      "mine.py: AssertionError: config.stage is x",
    ),
    ("def get_config(arg):\n\n  return 1 / 0", "mine.py, line 3: ZeroDivision"),
  ],
)
def test_mistakes_in_a_file_of_ones_own(text, message, tmp_path):
  file = tmp_path / "mine.py"
  file.write_text(text)
  with pytest.raises(UserError) as error:
    parse(f"--config={file}:digits", "--workdir=w")
  assert message in str(error.value)
  assert "\n" not in str(error.value)


def test_a_negative_value_after_its_flag():
  config, _ = parse("--config=digits", "--workdir=w", "--config.seed", "-1")
  assert config.seed == -1  # `config.check` refuses it


def test_ctrl_c_is_one_line(capsys):
  def train(config, workdir):
    raise KeyboardInterrupt

  with pytest.raises(SystemExit) as ended:
    cli.run(train, stage="pretrain", argv=["--config=digits", "--workdir=w"])
  assert ended.value.code == 130
  assert capsys.readouterr().err == "interrupted\n"
