"""Configs: every mistake is named before anything starts, and every shipped config trains.

Set FAULT_TESTS=full for 2,000 generated configs instead of 150.
"""

import copy
import math
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from environments.section import Section
from run.config import SECTIONS, Config, check_config, load_config
from run.lifecycle import NonFinite
from tools.write_docs import FILES
from trainer import Options, PPOTrainer
from utils import UserError

SHIPPED = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))
TEXTS = {path.stem: path.read_text() for path in SHIPPED}
FULL = os.environ.get("FAULT_TESTS") == "full"


# ---------------------------------------------------------------------------------------------------------- training


def scaled_down(checked: Config, **changes) -> Config:
    """A config as small as possible that was and still is allowed."""
    config = checked.model_dump()
    transformer = config["transformer"]
    transformer["num_heads"] = min(transformer["num_heads"], 2)
    transformer["embed_dim"] = 32
    transformer["num_blocks"] = min(transformer["num_blocks"], 2)
    transformer["memory_length"] = min(transformer["memory_length"], 32)
    config["n_workers"], config["worker_steps"] = min(config["n_workers"], 4), min(config["worker_steps"], 16)
    samples = config["n_workers"] * config["worker_steps"]
    fitting = [count for count in (1, 2, 4) if count <= config["n_mini_batch"] and samples % count == 0]
    config["n_mini_batch"] = fitting[-1]
    if samples == fitting[-1]:
        config["normalize_advantages"], config["advantage_floor"] = False, 0.0
    config["hidden_layer_size"] = min(config["hidden_layer_size"], 32)
    config["epochs"] = min(config["epochs"], 2)
    config["updates"] = 1
    config["video_interval"] = 0
    return check_config(config | changes, "scaled down")


def make_trainer(config: Config, folder: Path, processes: int) -> PPOTrainer:
    (folder / "checkpoints" / "run").mkdir(parents=True, exist_ok=True)
    (folder / "models").mkdir(exist_ok=True)
    return PPOTrainer(config, "run", 1, Options(torch.device("cpu"), processes, folder=folder))


@contextmanager
def one_thread():
    """Threads of tiny models would mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Hang(BaseException):
    """Nothing but the test is to notice it."""


@contextmanager
def patience(seconds: int):
    """Raise Hang where something hangs."""

    def give_up(number: int, frame: object) -> None:
        raise Hang(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config_trains(path, tmp_path, monkeypatch):
    config = scaled_down(load_config(path))
    if ":" in (getattr(config.environment, "name", None) or ""):
        pytest.importorskip(config.environment.name.split(":")[0], reason="an optional package")
    logged = []
    true = PPOTrainer.train_update

    def train_update(self):
        logged.append(true(self))
        assert ("episode/reward_mean" in logged[-1]) == bool(self.finished)
        assert ("episode/length_mean" in logged[-1]) == bool(self.finished)
        return logged[-1]

    monkeypatch.setattr(PPOTrainer, "train_update", train_update)
    with one_thread():
        make_trainer(config, tmp_path, processes=2).train()
    assert len(logged) == 1
    assert {"losses/policy", "losses/value", "losses/entropy", "training/kl", "gradients/all"} <= logged[0].keys()
    assert all(math.isfinite(value) for value in logged[0].values()), logged[0]
    assert (tmp_path / "models" / "run.nn").is_file()


def test_episode_statistics_appear_with_the_first_episode(tmp_path):
    """CartPole cannot end within 4 steps; with 16 more some do."""
    config = scaled_down(load_config(SHIPPED[0].parent / "cartpole_masked.yaml"), worker_steps=4, n_mini_batch=2)
    trainer = make_trainer(config, tmp_path, processes=1)
    with one_thread():
        try:
            trainer.start_workers()
            assert not [tag for tag in trainer.train_update() if tag.startswith("episode/")]
            for _ in range(40):
                scalars = trainer.train_update()
                if trainer.finished:
                    break
        finally:
            trainer.workers.close()
    assert {"episode/reward_mean", "episode/reward_std", "episode/length_mean", "episode/length_std"} <= scalars.keys()


def test_command_count_is_as_shipped():
    """The length of an episode of Mortar Mayhem Grid follows from it."""
    config = load_config(SHIPPED[0].parent / "mortar_mayhem_grid.yaml")
    assert config.environment.options["command_count"] == [10]
    assert config.environment.options["explosion_delay"] == [6]


# ----------------------------------------------------------------------------------------------- what is to be noticed


def good() -> dict:
    return yaml.safe_load(TEXTS["poc_memory_env"])


def problems(config: object) -> list[str]:
    """The lines that are said about a config."""
    with pytest.raises(UserError) as caught:
        check_config(config, "a.yaml")
    lines = str(caught.value).split("\n")
    assert all(line.startswith("a.yaml: ") for line in lines), lines
    return [line.removeprefix("a.yaml: ") for line in lines]


def with_value(key: str, value: object) -> dict:
    """The good config with another value of a key such as "transformer.embed_dim"."""
    config = good()
    section = config
    *path, last = key.split(".")
    for name in path:
        section = section.setdefault(name, {})
    section[last] = value
    return config


def test_numbers_as_yaml_reads_them():
    assert yaml.safe_load("3e-4") == "3e-4"
    for text in ("3e-4", "3.0e-4", "0.0003", 3e-4):
        checked = check_config(with_value("learning_rate_schedule.initial", text), "")
        assert checked.learning_rate_schedule.initial == 3e-4
    checked = check_config(with_value("gamma", 1), "")
    assert checked.gamma == 1.0 and type(checked.gamma) is float


BAD = {
    "gamma": [True, "much", None, [], {}, float("nan"), float("inf"), -0.1, 1.1, "nan", 10**400],
    "epochs": [True, False, 0, -1, 2.5, 4.0, "4", "3e-4", None, 10**9, [4], float("nan")],
    "n_workers": [0, -16, True, 16.0, 10**9],
    "worker_steps": [0, -1, None, 10**9],
    "n_mini_batch": [0, -8, 7, 10**9, "8"],
    "updates": [0, -1, 1.5],
    "normalize_advantages": [1, 0, "yes", None],
    "advantage_floor": [-0.1, True, None, float("inf")],
    "max_grad_norm": [0, -0.5, "inf"],
    "transformer.embed_dim": [0, -64, 63, 1, 64.0, "64"],
    "transformer.num_heads": [0, -1, 5, 128, True],
    "transformer.memory_length": [0, -1, 1.5, None],
    "transformer.positional_encoding": [None, "rel", 1, "Absolute"],
    "transformer.layer_norm": [None, "both", True],
    "transformer.gtrxl": [0, "True", None],
    "transformer.gtrxl_bias": ["much", True, None],
    "environment.type": [None, "Poc", 3, ["PocMemoryEnv"], ""],
    "environment.reset_params": [None, [], 5, {"num-seeds": 0}, {"start-seed": -1}, {"num-seeds": True}],
    "environment": [None, [], "PocMemoryEnv"],
    "learning_rate_schedule.max_decay_steps": [0, -1, 1.5],
    "learning_rate_schedule.power": [0, "fast"],
    "clip_range_schedule.initial": [-0.1, None],
}


@pytest.mark.parametrize("key, value", [(key, value) for key, values in BAD.items() for value in values],
                         ids=lambda value: repr(value)[:30])  # fmt: skip
def test_bad_value(key, value):
    (line,) = problems(with_value(key, value))
    assert line.startswith((key, "transformer.embed_dim") if key == "transformer.num_heads" else key), line
    assert "should" in line and len(line) < 350
    shown = repr(value if not isinstance(value, dict) or not value else next(iter(value.values())))
    assert shown[:40] in line or str(value)[:40] in line, line


def test_all_problems_are_said_at_once():
    config = good()
    config["epochz"] = config.pop("epochs")
    del config["updates"]
    config["gamma"] = 2
    config["transformer"]["embed_dim"] = 0
    del config["learning_rate_schedule"]["final"], config["transformer"]["memory_length"]
    config["transformer"]["colour"] = "red"
    lines = problems(config)
    starts = ["epochz: unknown key, did you mean 'epochs'?", "gamma: 2.0 should be a number, from 0 to 1",
              "updates: missing, should be a whole number, from 1 to 1,000,000,000",
              "transformer.colour: unknown key, allowed are num_blocks", "transformer.embed_dim: 0 should be",
              "transformer.memory_length: missing, should be", "learning_rate_schedule.final: missing"]  # fmt: skip
    assert len(lines) == len(starts)
    for start in starts:
        assert sum(line.startswith(start) for line in lines) == 1, (start, lines)
    (line,) = problems({key: value for key, value in good().items() if key != "learning_rate_schedule"})
    assert line == "learning_rate_schedule: missing, it holds initial, final, power, max_decay_steps"
    assert len(problems({})) == sum(field.is_required() for field in Config.model_fields.values())


def test_rules_between_keys():
    (line,) = problems(with_value("transformer.num_heads", 3))
    assert line == "transformer.embed_dim: 64 should be divisible by transformer.num_heads, 3"
    for name in ("gamma_schedule", "lamda_schedule"):
        (line,) = problems(with_value(name, {"initial": 0.9, "final": 1.2, "max_decay_steps": 5}))
        assert line == f"{name}: 1.2 should be at most 1"
    (line,) = problems(with_value("n_mini_batch", 3))
    assert line == "n_mini_batch: 3 should divide n_workers·worker_steps, 2048"
    config = with_value("transformer.positional_encoding", "")
    config["transformer"]["query_position"] = True
    (line,) = problems(config)
    assert line == (
        "transformer.query_position: True should come with a transformer.positional_encoding: "
        "absolute, learned or relative"
    )
    for encoding in ("absolute", "learned", "relative"):
        config["transformer"]["positional_encoding"] = encoding
        assert check_config(config, "").transformer.query_position is True


# ------------------------------------------------------------------------------------------- sections of environments

NEEDED = {"Minigrid": {"name": "MiniGrid-MemoryS9-v0"}, "Gymnasium": {"name": "CartPole-v1"}}
BAD_SECTIONS = [
    ("Minigrid", {"name": None}, "environment.name: None should be the registered id of a Minigrid environment"),
    ("Gymnasium", {"name": ""}, "environment.name: '' should be the registered id of a Gymnasium environment"),
    *[
        (
            "Minigrid",
            {"view_size": size},
            f"environment.view_size: {size!r} should be a whole number, odd, from 3 to 99",
        )
        for size in (4, 1, -3, "7", None, 101, True)
    ],
    ("Minigrid", {"tile_size": None}, "environment.tile_size: None should be a whole number, from 1 to 64"),
    ("Minigrid", {"num_actions": 8}, "environment.num_actions: 8 should be a whole number, from 1 to 7"),
    ("Minigrid", {"max_episode_steps": 1.5}, "environment.max_episode_steps: 1.5 should be a whole number, from 1 to"),
    ("Minigrid", {"mission": "yes"}, "environment.mission: 'yes' should be True or False"),
    ("CartPole", {"max_episode_steps": 0}, "environment.max_episode_steps: 0 should be a whole number, from 1 to"),
    ("CartPole", {"view_size": 3}, "environment.view_size: unknown key for type CartPole, it belongs to Minigrid"),
    (
        "CartPole",
        {"colour": 3},
        "environment.colour: unknown key for type CartPole, allowed are type, reset_params",
    ),
    ("Gymnasium", {"argumets": {}}, "environment.argumets: unknown key for type Gymnasium, did you mean 'arguments'?"),
    ("Gymnasium", {"arguments": {1: 2}}, "environment.arguments: {1: 2} should be a mapping of names to values"),
    (
        "Gymnasium",
        {"hide": [1, "2:3", "x"]},
        "environment.hide: [1, '2:3', 'x'] should be a list of indices",
    ),
    ("Gymnasium", {"hide": [True]}, "environment.hide: [True] should be a list of indices"),
    ("Gymnasium", {"observe": "all"}, "environment.observe: 'all' should be a list of names"),
    ("Gymnasium", {"observe": []}, "environment.observe: [] should be a list of names"),
    ("Gymnasium", {"reward_scale": "nan"}, "environment.reward_scale: nan should be a number, from 1e-06"),
    (
        "PocMemoryEnv",
        {"reset_params": {"command_count": [5]}},
        "environment.reset_params.command_count: unknown key for type PocMemoryEnv, allowed are start-seed, num-seeds",
    ),
    ("MortarMayhem", {"reset_params": {4: 5}}, "environment.reset_params.4: unknown key, keys should be text"),
]


@pytest.mark.parametrize(("kind", "changes", "start"), BAD_SECTIONS, ids=lambda value: str(value)[:40])
def test_bad_section(kind, changes, start):
    (line,) = problems(with_value("environment", {"type": kind} | NEEDED.get(kind, {}) | changes))
    assert line.startswith(start), line


def test_sections_by_type():
    """Each type takes the keys that it declares, says which it lacks and refuses those of all others."""
    values = {"max_episode_steps": 7, "view_size": 5, "tile_size": 9, "num_actions": 2, "mission": True, "hide": [0],
              "arguments": {"a": 1}, "observe": ["a"], "previous_action": True, "previous_reward": True,
              "reward_scale": 0.5, "name": "CartPole-v1", "corridor_length": 9, "passive": False, "guided": False,
              "episode_length": 60}  # fmt: skip
    declared = {key for section in SECTIONS.values() for key in section.model_fields}
    assert values.keys() == declared - Section.model_fields.keys()
    for kind, section in SECTIONS.items():
        for key, value in values.items():
            given = {"type": kind} | NEEDED.get(kind, {}) | {key: value}
            if key in section.model_fields:
                checked = check_config(with_value("environment", given), "").environment
                assert type(checked) is section and getattr(checked, key) == value
                continue
            (line,) = problems(with_value("environment", given))
            owners = [name for name, other in SECTIONS.items() if key in other.model_fields]
            assert line == f"environment.{key}: unknown key for type {kind}, it belongs to {', '.join(owners)}"
    for kind in NEEDED:
        (line,) = problems(with_value("environment", {"type": kind}))
        assert line == f"environment.name: missing, should be the registered id of a {kind} environment"
    (line,) = problems(with_value("environment", {}))
    assert line.startswith("environment.type: missing, should be text, one of 'PocMemoryEnv', 'CartPole'")


def test_what_a_section_leaves_out():
    """Optional keys are None to who reads them and are not stored; nothing can be changed."""
    section = check_config(with_value("environment", {"type": "Minigrid", "name": "a"}), "").environment
    assert section.view_size is None and "view_size" not in section.model_dump()
    with pytest.raises(ValueError, match="frozen"):
        section.view_size = 3


def test_a_config_is_checked_without_a_simulator():
    """Command lines answer at once, and processes of environments import what they play only."""
    line = "import run.config, sys; print(sorted({'minigrid', 'memory_gym', 'pygame'} & {*sys.modules}))"
    assert subprocess.check_output([sys.executable, "-c", line], cwd=SHIPPED[0].parents[1], text=True) == "[]\n"


# -------------------------------------------------------------------------------------------------------------- --set


def test_overrides():
    path = SHIPPED[0].parent / "mortar_mayhem_grid_published.yaml"
    config = load_config(
        path,
        ["transformer.num_blocks=2", "learning_rate_schedule.initial=3e-4", "clip_range_schedule.final=0.05",
         "gamma=.5", "environment.reset_params.command_count=[5, 6]", "transformer.positional_encoding=", "gamma=0.9",
         'transformer.positional_encoding=""'],
    )  # fmt: skip
    assert config.transformer.num_blocks == 2 and config.gamma == 0.9 and config.transformer.positional_encoding == ""
    assert config.learning_rate_schedule.initial == 3e-4 and config.learning_rate_schedule.final == 1e-5
    before = load_config(path)
    assert config.clip_range_schedule == before.clip_range_schedule.model_copy(update={"final": 0.05})
    assert config.environment.options == before.environment.options | {"command_count": [5, 6]}
    assert load_config(path, ["environment={type: CartPole}"]).environment.max_episode_steps == 200


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("gamma", "--set gamma: should be key=value"),
        ("=1", "--set =1: should be key=value"),
        ("gamma=", "--set: gamma: None should be a number, from 0 to 1"),
        ("gamma=[", "--set gamma=[: is not valid YAML"),
        ("gamma=*a", "--set gamma=*a: is not valid YAML: aliases"),
        ("gama=0.9", "--set: gama: unknown key, did you mean 'gamma'?"),
        ("updates.a=1", "--set updates.a: updates is one value"),
        ("transformer.num_blocks=two", "--set: transformer.num_blocks: 'two' should be a whole number"),
        (
            "transformer.num_heads=5",
            "--set: transformer.embed_dim: 384 should be divisible by transformer.num_heads, 5",
        ),
        ("environment.type=CartPole", "--set: environment.name: unknown key for type CartPole"),
        ("learning_rate_schedule={initial: 1}", "--set: learning_rate_schedule.final: missing"),
        (".=1", "--set .=1: should be key=value"),
        ("a" * 500 + "=1", "--set: aaaa"),
    ],
    ids=lambda value: value[:30],
)
def test_bad_override(override, said):
    with pytest.raises(UserError) as caught:
        load_config(SHIPPED[0].parent / "minigrid.yaml", ["updates=3", override])
    line = str(caught.value).split("\n")[0]
    assert line.startswith(said) and len(line) < 600, line


@pytest.mark.parametrize(
    "text",
    ["", "5", "- a", "a: [", "a: b: c", "\t", "\0", "a: &x {b: *x}", "? {a: b}\n: 1", "a: 2024-13-45", "a: *b",
     "!!python/name:os.x",
     "!!python/object/apply:os.system ['touch canary']", "a: !!binary x", "&a [*a]", "\ufeff", "%YAML 9.9\n---\na: 1",
     "a: " + "[" * 5000, "gamma: 0x" + "f" * 5000, "gamma: " + "9" * 5000, "--- 1\n--- 2", "{[a]: 1}"],
    ids=repr,
)  # fmt: skip
def test_texts_that_are_no_configs(text, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with patience(20), pytest.raises(UserError) as caught:
        load_config(path)
    for line in str(caught.value).split("\n"):
        assert line.startswith(f"{path}: ") and len(line) < 500 + len(str(path)), line
    assert not (tmp_path / "canary").exists() and not Path("canary").exists()


def test_a_key_that_is_there_twice(tmp_path):
    """YAML lets the last one win, silently; whoever wrote it meant one of them."""
    path = tmp_path / "a.yaml"
    path.write_text(TEXTS["poc_memory_env"] + "epochs: 7\n")
    with pytest.raises(UserError, match="epochs"):
        load_config(path)


def test_aliases_that_grow_without_end(tmp_path):
    """A few lines can stand for more values than there is memory."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    path = tmp_path / "a.yaml"
    path.write_text("\n".join([*lines, TEXTS["poc_memory_env"].replace("gamma: 0.99", "gamma: *a11")]))
    with patience(20), pytest.raises(UserError):
        load_config(path)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    for path in (tmp_path, tmp_path / "nowhere.yaml", tmp_path / "binary.yaml", "/proc/self/mem", "a\0b"):
        with pytest.raises(UserError) as caught:
            load_config(path)
        assert "\n" not in str(caught.value)


def test_a_checked_config_stays_as_it_is():
    for stem, text in TEXTS.items():
        config = check_config(yaml.safe_load(text), stem)
        stored = config.model_dump()
        assert check_config(stored, stem) == config
        assert list(stored) == list(Config.model_fields)
        assert yaml.safe_load(yaml.safe_dump(stored)) == stored


@pytest.mark.parametrize("path", [*(SHIPPED[0].parents[1] / "models").glob("*.nn")], ids=lambda path: path.stem)
def test_configs_stored_before_they_were_typed(path):
    stored = torch.load(path, weights_only=True, map_location="cpu")["config"]
    checked = check_config(stored, path.stem).model_dump()
    for key, value in stored.items():
        part = {inner: checked[key][inner] for inner in value} if isinstance(value, dict) else checked[key]
        assert part == value, key


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_is_written_from_the_declarations(path):
    assert path.read_text(encoding="utf-8") == FILES[path](), "to be written anew by `python -m tools.write_docs`"


def test_configs_say_only_what_differs():
    """Two tasks can be compared by eye; editors find the schema."""
    for stem, text in TEXTS.items():
        assert text.startswith("# yaml-language-server: $schema=schema.json\n"), stem
        for key, value in yaml.safe_load(text).items():
            field = Config.model_fields[key]
            assert field.is_required() or value != field.default, (stem, key)


# ----------------------------------------------------------------------------------------------- generated bad configs

JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 5),
    st.sampled_from([10**4, 10**6, 10**9, 2**31, 2**63, 2**70, -(2**40), 10**400, 7, 31, 33, 100]),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=8),
    st.sampled_from(["3e-4", "1e2", "nan", "-inf", "", "True", "0x10", "1_000", "PocMemoryEnv", "absolute", "post"]),
    st.sampled_from([[], {}, [[]], {"a": {"b": {"c": []}}}, [1, 2], {1: 2}, {None: None}, b"bytes", ("a",)]),
    st.recursive(st.integers() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3), max_leaves=6),
).map(copy.deepcopy)  # fmt: skip


def places(section: dict, path: tuple = ()) -> list[tuple]:
    """The paths to all keys."""
    found = []
    for key, value in section.items():
        found.append((*path, key))
        if isinstance(value, dict):
            found += places(value, (*path, key))
    return found


@st.composite
def mutated(draw) -> str:
    """The text of a shipped config in which something was changed."""
    text = TEXTS[draw(st.sampled_from(sorted(TEXTS)))]
    if draw(st.integers(0, 3)) == 0:
        for _ in range(draw(st.integers(1, 3))):
            place = draw(st.integers(0, len(text)))
            deed = draw(st.sampled_from(("insert", "delete", "cut", "double", "indent")))
            if deed == "insert":
                text = (
                    text[:place]
                    + draw(st.sampled_from(list(":-{}[]&*!|>%@`#'\"\t\n ,?0e.\0é") + ["---\n"]))
                    + text[place:]
                )
            elif deed == "delete":
                text = text[:place] + text[place + 1 :]
            elif deed == "cut":
                text = text[:place]
            else:
                lines = text.split("\n")
                line = draw(st.integers(0, len(lines) - 1))
                lines[line : line + 1] = [lines[line]] * 2 if deed == "double" else [" " + lines[line]]
                text = "\n".join(lines)
        return text
    config = yaml.safe_load(text)
    for _ in range(draw(st.integers(1, 3))):
        if not config:
            break
        *path, key = draw(st.sampled_from(places(config)))
        section = config
        for name in path:
            section = section[name]
        deed = draw(st.sampled_from(("junk", "junk", "junk", "scale", "drop", "misspell", "add", "move", "type")))
        if deed == "junk":
            section[key] = draw(JUNK)
        elif deed == "scale" and isinstance(section[key], (int, float)):
            section[key] = section[key] * draw(st.sampled_from((-1, 0, 2, 3, 0.5, 10, 1000, 10**9)))
        elif deed == "drop":
            del section[key]
        elif deed == "misspell":
            place = draw(st.integers(0, len(str(key))))
            section[str(key)[:place] + draw(st.sampled_from(("", "x", "_", " "))) + str(key)[place + 1 :]] = (
                section.pop(key)
            )
        elif deed == "add":
            section[
                draw(st.one_of(st.text(max_size=6), st.sampled_from(["view_size", "name", "num-seeds", "coin_scale"])))
            ] = draw(JUNK)
        elif deed == "move":
            config[key] = section.pop(key)
        elif deed == "type" and isinstance(config.get("environment"), dict):  # a key of another type, or another type
            kind, other = draw(st.sampled_from(sorted(SECTIONS))), draw(st.sampled_from(sorted(SECTIONS)))
            foreign = draw(st.sampled_from(sorted(SECTIONS[other].model_fields)))
            config["environment"] |= {"type": kind} if foreign == "type" else {foreign: draw(JUNK)}
    return yaml.dump(config)


OUTCOMES: dict[str, int] = {}


@settings(max_examples=2000 if FULL else 150)
@given(text=mutated())
def test_generated_configs(text, tmp_path_factory):
    """Each is refused with a line per problem, or is a config; some of these train, all of them at full size."""
    folder = tmp_path_factory.mktemp("generated")
    path = folder / "a.yaml"
    path.write_text(text, encoding="utf-8")

    def count(outcome: str) -> None:
        OUTCOMES[outcome] = OUTCOMES.get(outcome, 0) + 1

    try:
        with patience(20):
            config = load_config(path)
    except UserError as error:
        lines = str(error).split("\n")
        assert all(line.startswith(f"{path}: ") and len(line) < 600 + len(str(path)) for line in lines), lines
        assert len(set(lines)) == len(lines)
        count("refused by the check")
        return
    assert check_config(config.model_dump(), "") == config
    tried = sum(OUTCOMES.get(key, 0) for key in ("trained", "refused at the start", "no numbers"))
    if not FULL and tried >= 8 and OUTCOMES.get("trained", 0) >= 3:
        count("accepted, not tried")
        return
    try:
        with patience(120), one_thread():
            make_trainer(scaled_down(config), folder, processes=1).train()
        count("trained")
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000, str(error)
        count("refused at the start")
    except NonFinite as error:
        assert "\n" not in str(error)
        count("no numbers")


def test_generated_configs_were_of_all_kinds():
    """Belongs to the test above: what it generates is worth its time."""
    if not OUTCOMES:
        pytest.skip("nothing was generated")
    print(OUTCOMES)
    assert OUTCOMES["refused by the check"] > sum(OUTCOMES.values()) / 3
    assert OUTCOMES.get("trained", 0) >= 3
