"""Configs: what may stand in them, and every mistake found before anything starts."""

import difflib
import math
from dataclasses import dataclass
from pathlib import Path

import yaml

from utils import ENVIRONMENT_TYPES, UserError

OMITTED = object()


@dataclass(frozen=True)
class Field:
    """What a config may hold under one key.

    Attributes:
        kind: int, float, bool, str or dict.
        allowed: the values allowed, in words.
        test: whether a value of the right kind is allowed.
        default: used where the key is missing; None where it must not be, OMITTED where it stays missing.
    """

    kind: type
    allowed: str = ""
    test: object = lambda value: True
    default: object = None


def _within(kind: type, low: float, high: float, default: object = None) -> Field:
    return Field(kind, f"from {low:,} to {high:,}", lambda value: low <= value <= high, default)


def _one_of(*values: str, default: str | None = None) -> Field:
    return Field(str, "one of " + ", ".join(repr(value) for value in values), lambda value: value in values, default)


def _schedule(default: dict | None = None) -> dict[str, Field]:
    default = default or {}
    return {
        "initial": _within(float, 0, 1000, default.get("initial")),
        "final": _within(float, 0, 1000, default.get("final")),
        "power": _within(float, 0.01, 100, default.get("power")),
        "max_decay_steps": _within(int, 1, 10**9, default.get("max_decay_steps")),
    }


SCHEMA: dict[str, Field | dict[str, Field]] = {
    "environment": {
        "type": _one_of(*ENVIRONMENT_TYPES),
        "name": Field(str, default=OMITTED),
        "reset_params": Field(dict, default={}),
        "max_episode_steps": _within(int, 1, 10**6, OMITTED),
        "view_size": Field(int, "odd, from 3 to 99", lambda value: value in range(3, 100, 2), OMITTED),
        "tile_size": _within(int, 1, 64, OMITTED),
        "num_actions": _within(int, 1, 7, OMITTED),
    },
    "gamma": _within(float, 0, 1),
    "lamda": _within(float, 0, 1),
    "updates": _within(int, 1, 10**9),
    "epochs": _within(int, 1, 1000),
    "n_workers": _within(int, 1, 4096),
    "worker_steps": _within(int, 1, 10**5),
    "n_mini_batch": _within(int, 1, 10**6),
    "value_loss_coefficient": _within(float, 0, 1000),
    "hidden_layer_size": _within(int, 1, 10**5),
    "max_grad_norm": _within(float, 1e-6, 10**6),
    "value_gain": _within(float, 0, 1000, 1.0),
    "normalize_advantages": Field(bool, default=True),
    "reconstruction_coefficient": _within(float, 0, 1000, 0.0),
    "recall_coefficient": _within(float, 0, 1000, 0.0),
    "checkpoint_interval": _within(int, 1, 10**9, 50),
    "model_interval": _within(int, 0, 10**9, 0),
    "video_interval": _within(int, 0, 10**9, 0),
    "histogram_interval": _within(int, 0, 10**9, 0),
    "transformer": {
        "num_blocks": _within(int, 1, 100),
        "embed_dim": _within(int, 2, 2**14),
        "num_heads": _within(int, 1, 2**14),
        "memory_length": _within(int, 1, 10**5),
        "positional_encoding": _one_of("", "absolute", "learned", "relative"),
        "layer_norm": _one_of("", "pre", "post"),
        "gtrxl": Field(bool),
        "gtrxl_bias": _within(float, -100, 100, 0.0),
    },
    "learning_rate_schedule": _schedule(),
    "beta_schedule": _schedule(),
    "clip_range_schedule": _schedule(),
    "novelty_schedule": _schedule({"initial": 0.0, "final": 0.0, "power": 1.0, "max_decay_steps": 1}),
}


class Loader(yaml.SafeLoader):
    """YAML without keys that are there twice, of which all but the last are lost, and aliases, which can explode."""

    def compose_node(self, parent: object, index: object) -> yaml.Node:
        """Read a node that is no alias."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases such as *{self.peek_event().anchor} are not supported")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Return a mapping of distinct keys."""
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {_short(key)} is there {keys.count(key)} times")
        return super().construct_mapping(node, deep)


def load_config(path: str | Path) -> dict:
    """Read and check a YAML config.

    Args:
        path: the file.

    Returns:
        The config with every default filled in.

    Raises:
        UserError: naming all that is wrong with it, a line each.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        return check_config(yaml.load(text, Loader), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date
        raise UserError(f"{path}: is not valid YAML: {' '.join(str(error).split())}") from error


def check_config(config: object, source: str) -> dict:
    """Check a config against SCHEMA and the rules between its keys.

    Args:
        config: what was read.
        source: where it came from, for the messages.

    Returns:
        A copy with numbers as numbers and every default filled in.

    Raises:
        UserError: naming all that is wrong with it, a line each.
    """
    problems: list[str] = []
    checked = _check_section(config, SCHEMA, "", problems)
    if not problems:
        problems = _check_rules(checked)
    if problems:
        raise UserError("\n".join(f"{source}: {problem}" for problem in problems))
    return checked


def _check_section(section: object, schema: dict, prefix: str, problems: list[str]) -> dict:
    """Return the checked values of one section; what is wrong is added to `problems`."""
    if not isinstance(section, dict):
        problems.append(f"{prefix.rstrip('.') or 'the file'}: {_short(section)} should be a mapping of keys to values")
        return {}
    for key in section:
        if key not in schema:
            near = difflib.get_close_matches(str(key), schema, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(schema)}"
            problems.append(f"{prefix}{_short(key, bare=True)}: unknown key, {hint}")
    checked = {}
    for key, field in schema.items():
        if isinstance(field, dict):
            optional = all(leaf.default is not None for leaf in field.values())
            if key in section or optional:
                checked[key] = _check_section(section.get(key, {}), field, f"{prefix}{key}.", problems)
            else:
                problems.append(f"{prefix}{key}: missing, it holds {', '.join(field)}")
        elif key in section:
            checked[key] = _check_value(section[key], field, prefix + key, problems)
        elif field.default is None:
            problems.append(f"{prefix}{key}: missing, should be {_describe(field)}")
        elif field.default is not OMITTED:
            checked[key] = field.default
    return checked


def _check_value(value: object, field: Field, key: str, problems: list[str]) -> object:
    """Return the value as its field's kind; what is wrong is added to `problems`."""
    if field.kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 3e-4 as a string
            value = float(value)
        except (ValueError, OverflowError):
            pass
    finite = not isinstance(value, float) or math.isfinite(value)
    if type(value) is not field.kind or not finite or not field.test(value):
        problems.append(f"{key}: {_short(value)} should be {_describe(field)}")
    return value


def _describe(field: Field) -> str:
    kind = {int: "a whole number", float: "a number", bool: "True or False", str: "text", dict: "a mapping"}
    return kind[field.kind] + (f", {field.allowed}" if field.allowed else "")


def _short(value: object, bare: bool = False) -> str:
    text = str(value) if bare else repr(value)
    return " ".join(text.split()) if len(text) <= 60 else " ".join(text[:57].split()) + "…"


def _check_rules(config: dict) -> list[str]:
    """Return what is wrong between keys that are fine on their own."""
    problems = []
    transformer, environment = config["transformer"], config["environment"]
    embed_dim, heads = transformer["embed_dim"], transformer["num_heads"]
    if embed_dim % heads:
        problems.append(f"transformer.embed_dim: {embed_dim} should be divisible by transformer.num_heads, {heads}")
    if embed_dim % 2:
        problems.append(f"transformer.embed_dim: {embed_dim} should be even")
    samples, minibatches = config["n_workers"] * config["worker_steps"], config["n_mini_batch"]
    if samples % minibatches:
        problems.append(f"n_mini_batch: {minibatches} should divide n_workers·worker_steps, {samples}")
    elif samples == minibatches and config["normalize_advantages"]:
        problems.append(f"n_mini_batch: {minibatches} leaves one sample, whose advantage cannot be normalised")
    if environment["type"] in ("Minigrid", "Gymnasium") and not environment.get("name"):
        problems.append(
            f"environment.name: missing, should be the registered id of a {environment['type']} environment"
        )
    for key, low in (("start-seed", 0), ("num-seeds", 1)):
        value = environment["reset_params"].get(key, low)
        if type(value) is not int or not low <= value < 2**30:
            problems.append(f"environment.reset_params.{key}: {_short(value)} should be a whole number, at least {low}")
    return problems
