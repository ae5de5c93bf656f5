"""Configs: every mistake is named before anything starts, and every shipped config trains."""

import math
from pathlib import Path

import pytest
import torch
import yaml

from run.config import Config, check_config, load_config
from run.start import Options, Run
from tests.walk import task_of
from tools.write_docs import FILES
from trainer import PPOTrainer
from utils import UserError

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
TEXTS = {path.stem: path.read_text() for path in SHIPPED}


def scaled_down(checked: Config) -> Config:
    """A config as small as possible that was and still is allowed."""
    config = checked.model_dump()
    for name in ("transformer", "recurrence", "memoryless"):
        if config[name] is not None:
            config[name] = {key: min(value, 32) if type(value) is int else value for key, value in config[name].items()}
    if config["transformer"]:
        config["transformer"] |= {"num_heads": min(config["transformer"]["num_heads"], 2), "num_blocks": 2}
    config |= {"n_workers": 4, "worker_steps": 16, "n_mini_batch": min(config["n_mini_batch"], 2), "epochs": 2}
    config |= {"hidden_layer_size": 32, "updates": 1, "video_interval": 0, "eval_interval": 0}
    config["segment_length"] = math.gcd(config["segment_length"], 16)
    return check_config(config, "scaled down")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config_trains(path, tmp_path, monkeypatch):
    """At once there are all numbers but those of episodes, which appear with the first that has ended."""
    config = scaled_down(load_config(path))
    if ":" in (getattr(config.environment, "name", None) or ""):
        pytest.importorskip(config.environment.name.split(":")[0], reason="an optional package")
    logged = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Run, "after_update", lambda self, state, scalars: logged.append((state, scalars)))
    options = Options(torch.device("cpu"))
    PPOTrainer(config, task_of(config.environment), 1, options).train(Run("run", config, 1, options))
    ((state, scalars),) = logged
    assert {"losses/policy", "losses/value", "losses/entropy", "training/kl", "gradients/all"} <= scalars.keys()
    assert all(math.isfinite(value) for value in scalars.values()), scalars
    ended = any(state["environments"]["workers"]["number"])
    assert {tag in scalars for tag in ("episode/reward_mean", "episode/length_std")} == {ended}
    assert (tmp_path / "models" / "run.nn").is_file()


# ----------------------------------------------------------------------------------------------- what is to be noticed


def problems(config: object) -> list[str]:
    """The lines that are said about a config."""
    with pytest.raises(UserError) as caught:
        check_config(config, "a.yaml")
    lines = str(caught.value).split("\n")
    assert all(line.startswith("a.yaml: ") and len(line) < 700 for line in lines), lines
    return [line.removeprefix("a.yaml: ") for line in lines]


def with_values(**changes: object) -> dict:
    """A good config with other values of keys such as transformer__embed_dim."""
    config = yaml.safe_load(TEXTS["poc_memory_env"])
    for key, value in changes.items():
        section = config
        *path, last = key.split("__")
        for name in path:
            section = section.setdefault(name, {})
        section[last] = value
    return config


# YAML reads dates, bytes and sets; models and checkpoints could not be read again.
UNKEPT = ("[2021-01-01]", "!!binary abcd", "!!set {a}")
BAD = {
    "gamma": [True, "much", None, [], math.nan, 1.1, 10**400],
    "epochs": [True, 0, 4.0, "4", 10**9],
    "environment__type": [None, "Poc", ["PocMemoryEnv"]],
    "environment__reset_params": [None, [], {"num-seeds": 0}],
    "environment": [None, "PocMemoryEnv"],
    "environment__arguments__x": [yaml.safe_load(text) for text in UNKEPT],
    "memoryless": [1, {"embed_dim": 16, "positional_encoding": "relative"}],
}


@pytest.mark.parametrize("key", BAD)
def test_bad_values_are_named_by_their_key(key):
    for value in BAD[key]:
        gymnasium = {"environment": {"type": "Gymnasium", "name": "CartPole-v1"}} if "arguments" in key else {}
        (line,) = problems(with_values(**gymnasium, **{key: value}))
        assert line.startswith(key.replace("__", ".").removesuffix(".type")), line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"transformer__num_heads": 3}, "transformer.embed_dim: 64 should be divisible by num_heads, 3"),
        ({"gamma_schedule": {"initial": 0.9, "final": 1.2, "max_decay_steps": 5}}, "gamma_schedule: should be at most"),
        ({"n_mini_batch": 3}, "n_mini_batch: 3 should divide n_workers·worker_steps, 2048"),
        ({"segment_length": 3}, "segment_length: 3 should divide worker_steps, 128, and a minibatch, 256"),
        ({"transformer__query_position": True}, "transformer.query_position: needs a positional_encoding"),
        ({"memoryless": {}}, "exactly one of transformer, recurrence and memoryless"),
        ({"advantage_floor": 0.1, "normalize_advantages": False}, "advantage_floor: is for advantages"),
    ],
    ids=str,
)
def test_rules_between_keys(changes, said):
    (line,) = problems(with_values(**changes))
    assert line.startswith(said), line


def test_all_problems_are_said_at_once():
    config = with_values(gamma=2, transformer__embed_dim=0, transformer__colour="red", view_size=3)
    config["epochz"] = config.pop("epochs")
    del config["updates"], config["learning_rate_schedule"]["final"]
    starts = ["epochz: is not a key; did you mean epochs?", "gamma: should be less", "updates: has to be given",
              "transformer.colour: is not a key", "transformer.embed_dim: should be",
              "learning_rate_schedule.final: has to be given", "view_size: is not a key"]  # fmt: skip
    lines = problems(config)
    assert len(lines) == len(starts)
    for start in starts:
        assert sum(line.startswith(start) for line in lines) == 1, (start, lines)


# --------------------------------------------------------------------------------------------------------- files, --set


def test_overrides():
    path = ROOT / "configs" / "mortar_mayhem_grid_published.yaml"
    overrides = ["transformer.num_blocks=2", "learning_rate_schedule.initial=3e-4", "clip_range_schedule.final=0.05",
                 "gamma=.5", "environment.reset_params.command_count=[5, 6]", "gamma=0.9",
                 'transformer.positional_encoding=""']  # fmt: skip
    config = load_config(path, overrides)
    assert config.transformer.num_blocks == 2 and config.gamma == 0.9 and config.transformer.positional_encoding == ""
    assert config.learning_rate_schedule.initial == 3e-4 and config.learning_rate_schedule.final == 1e-5
    before = load_config(path)
    assert config.clip_range_schedule == before.clip_range_schedule.model_copy(update={"final": 0.05})
    assert config.environment.reset_params == before.environment.reset_params | {"command_count": [5, 6]}
    assert load_config(path, ["environment={type: CartPole}"]).environment.max_episode_steps == 200


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("gamma", "--set gamma: should be key=value"),
        ("gamma=[", "--set gamma=[: is not valid YAML"),
        ("updates.a=1", "--set updates.a: is not a key"),
        ("n_mini_batch=8192", "n_mini_batch: advantages of single samples"),
        ("environment.type=CartPole", "environment.name: is not a key"),
        ("environment.view_size=4", "environment.view_size: "),
    ],
)
def test_bad_override(override, said):
    with pytest.raises(UserError) as caught:
        load_config(ROOT / "configs" / "minigrid.yaml", ["updates=3", override])
    line = str(caught.value).split("\n")[0]
    assert said in line and len(line) < 1200, line


def test_files_that_are_no_configs(tmp_path, monkeypatch):
    """Code and keys that are there twice among them, a folder and no file: a short line for each thing."""
    monkeypatch.chdir(tmp_path)
    file = Path("a.yaml")
    for content in (
        b"", b"5", b"a: [", b"\xff\xfe\xfa", b"a: &x {b: *x}", b"? {a: b}\n: 1", b"a: 2024-13-45", b"--- 1\n--- 2",
        b"!!python/object/apply:os.system ['touch canary']", (TEXTS["poc_memory_env"] + "epochs: 7\n").encode(),
    ):  # fmt: skip
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"\A(a.yaml: .{,700}\n?)+\Z"):
            load_config(file)
    assert not Path("canary").exists()
    for path in (tmp_path, "nowhere.yaml"):
        with pytest.raises(UserError, match=rf"\A{path}: .*\Z"):
            load_config(path)


def test_a_checked_config_stays_as_it_is():
    """It can be written down and read again; no key repeats its default; editors find the schema."""
    for stem, text in TEXTS.items():
        config = check_config(yaml.safe_load(text), stem)
        stored = config.model_dump()
        assert check_config(yaml.safe_load(yaml.safe_dump(stored)), stem) == config
        assert text.startswith("# yaml-language-server: $schema=schema.json\n"), stem
        for key, value in yaml.safe_load(text).items():
            field = Config.model_fields[key]
            assert field.is_required() or value != field.default, (stem, key)


@pytest.mark.parametrize("path", [*(ROOT / "models").glob("*.nn")], ids=lambda path: path.stem)
def test_configs_of_shipped_models(path):
    """They are read as they were written, with defaults for keys that came later."""
    stored = torch.load(path, weights_only=True, map_location="cpu")["config"]
    checked = check_config(stored, path.stem).model_dump()
    for key, value in stored.items():
        part = {inner: checked[key][inner] for inner in value} if isinstance(value, dict) else checked[key]
        assert part == value, key


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_written_from_the_declarations(path):
    assert path.read_text(encoding="utf-8") == FILES[path](), "to be written anew by `python -m tools.write_docs`"
