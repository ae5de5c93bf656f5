"""Configs: what may stand in them, and every mistake found before anything starts.

`python -m tools.write_docs` writes configs/schema.json and docs/configuration.md from what is declared here and in
environments/section.py.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Le
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic.fields import FieldInfo
from typing_extensions import get_type_hints, is_typeddict

from environments import SECTIONS, Environment
from environments.section import Flag, Number, Schedule, Section, Whole, Words
from model import ModelConfig
from utils import UserError, polynomial_decay


class Config(ModelConfig):
    """Everything that a training depends on, but for its seed."""

    environment: Environment = Field(description="What is played: one of the sections below, told apart by `type`.")
    gamma: Number = Field(0.995, ge=0, le=1, description="Discount of future rewards.")
    lamda: Number = Field(0.95, ge=0, le=1, description="λ of the generalised advantage estimation.")
    updates: Whole = Field(
        ge=1, le=10**9, description="Updates of the run, each of `n_workers`·`worker_steps` environment steps."
    )
    epochs: Whole = Field(3, ge=1, le=1000, description="Passes over the rollout per update.")
    n_workers: Whole = Field(ge=1, le=4096, description="Environments.")
    worker_steps: Whole = Field(ge=1, le=10**5, description="Steps of each environment per update.")
    n_mini_batch: Whole = Field(
        8, ge=1, le=10**6, description="Minibatches per epoch; has to divide `n_workers`·`worker_steps`."
    )
    value_loss_coefficient: Number = Field(
        0.5, ge=0, le=1000, description="Weight of the value loss (squared error without ½)."
    )
    max_grad_norm: Number = Field(
        0.25, ge=1e-6, le=10**6, description="Gradients are clipped to this norm, taken over all of them."
    )
    normalize_advantages: Flag = Field(True, description="Advantages are normalised in each minibatch.")
    advantage_floor: Number = Field(
        0.0,
        ge=0,
        le=10**6,
        description="Normalised advantages are divided by their standard deviation or by this, whichever is larger, so "
        "that where nearly all goes well noise is not made as large as what is to be learned (as "
        "Hafner et al. 2023 do with returns).",
    )
    reconstruction_coefficient: Number = Field(
        0.0,
        ge=0,
        le=1000,
        description="Weight of an auxiliary loss: a decoder reconstructs the frame from the transformer's output "
        "(binary cross-entropy; frames only).",
    )
    recall_coefficient: Number = Field(
        0.0,
        ge=0,
        le=1000,
        description="Weight of an auxiliary loss of our own, episodic recall: say from the transformer's output which "
        "of the minibatch's distinct frames the running episode has shown (binary cross-entropy; frames only).",
    )
    prediction_coefficient: Number = Field(
        0.0,
        ge=0,
        le=1000,
        description="Weight of an auxiliary loss: from the transformer's output and the action, tell the next "
        "observation (frames: among the minibatch's distinct ones; vectors: by regression).",
    )
    checkpoint_interval: Whole = Field(50, ge=1, le=10**9, description="Updates between checkpoints.")
    model_interval: Whole = Field(
        0, ge=0, le=10**9, description="Updates between models kept in `checkpoints/<run-id>/`; 0 is never."
    )
    video_interval: Whole = Field(
        0, ge=0, le=10**9, description="Updates between episodes drawn for TensorBoard; 0 is never."
    )
    histogram_interval: Whole = Field(
        0, ge=0, le=10**9, description="Updates between histograms of the weights; 0 is never."
    )
    gamma_schedule: Schedule | None = Field(
        None,
        description="A discount that changes, and takes the place of `gamma` (François-Lavet et al. 2015).",
    )
    lamda_schedule: Schedule | None = Field(None, description="A λ that changes, and takes the place of `lamda`.")
    learning_rate_schedule: Schedule = Field(description="Learning rate of AdamW.")
    beta_schedule: Schedule = Field(
        Schedule(initial=1e-4, final=1e-6, max_decay_steps=10000), description="Coefficient of the entropy bonus."
    )
    clip_range_schedule: Schedule = Field(
        Schedule(initial=0.1, final=0.1, max_decay_steps=10000),
        description="ε, to which the policy's ratio and the value's change are clipped.",
    )
    novelty_schedule: Schedule = Field(
        Schedule(initial=0.0, final=0.0, max_decay_steps=1),
        description="Added to the training reward (not to the reported one) for each observation that the running "
        "episode has not shown yet, byte by byte; meant for grid worlds.",
    )

    def scheduled(self, name: str, update: int) -> float:
        """Return what `name`, such as gamma, is behind a number of finished updates: by its schedule, if it has one."""
        schedule = getattr(self, f"{name}_schedule")
        return getattr(self, name) if schedule is None else polynomial_decay(schedule, update)

    @model_validator(mode="before")
    @classmethod
    def _complete_schedules(cls, given: Any) -> Any:
        """Let a schedule with a default be changed in part."""
        if not isinstance(given, dict):
            return given
        completed = {
            key: field.default.model_dump() | given[key]
            for key, field in cls.model_fields.items()
            if isinstance(field.default, Schedule) and isinstance(given.get(key), dict)
        }
        return given | completed


WHOLE = FieldInfo.from_annotation(Config)


class Loader(yaml.SafeLoader):
    """YAML without keys that are there twice, of which all but the last are lost, and aliases, which can explode."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
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


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a YAML config.

    Args:
        path: the file.
        overrides: changes to what the file says, such as "transformer.num_blocks=2"; the value is YAML.

    Returns:
        The config with every default filled in.

    Raises:
        UserError: naming all that is wrong with it, a line each.
    """
    try:
        given = _parse(Path(path).read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError, ValueError) as error:  # ValueError: an impossible path
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from error
    config = check_config(given, str(path))
    if not overrides:
        return config
    for override in overrides:
        _override(given, override)
    return check_config(given, "--set")


def check_config(given: object, source: str) -> Config:
    """Check a config against what is declared and the rules between its keys.

    Args:
        given: what was read.
        source: where it came from, for the messages.

    Returns:
        The config, numbers as numbers and every default filled in.

    Raises:
        UserError: naming all that is wrong with it, a line each.
    """
    try:
        config = Config.model_validate(given)
        problems = _check_rules(config)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False)
        lines = (_problem(detail["type"], detail["loc"], detail["input"], given) for detail in found)
        problems = list(dict.fromkeys(lines))  # pydantic finds several where a value fits none of several types
    if problems:
        raise UserError("\n".join(f"{source}: {problem}" for problem in problems))
    return config


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date
        raise UserError(f"{source}: is not valid YAML: {' '.join(str(error).split())}") from error


def _override(given: dict, override: str) -> None:
    """Change one key of what a file says."""
    name, equals, text = override.partition("=")
    if not equals or "" in name.split("."):
        raise UserError(f"--set {_short(override, bare=True)}: should be key=value, as in transformer.num_blocks=2")
    *path, last = name.split(".")
    section = given
    for key in path:
        section = section.setdefault(key, {})
        if not isinstance(section, dict):
            raise UserError(f"--set {_short(name, bare=True)}: {key} is one value, without keys of its own")
    section[last] = _parse(text, f"--set {_short(override, bare=True)}")


def fields_of(field: FieldInfo) -> Mapping[str, FieldInfo]:
    """Return what is declared inside a field: of sections and typed mappings their keys, nothing of values."""
    kind = field.annotation
    if field.discriminator:
        return Section.model_fields
    if is_typeddict(kind):
        hints = get_type_hints(kind, include_extras=True)
        return {key: FieldInfo.from_annotation(hint) for key, hint in hints.items()}
    kinds = get_args(kind) or (kind,)  # of what may be left out
    return next((one.model_fields for one in kinds if isinstance(one, type) and issubclass(one, BaseModel)), {})


def describe(field: FieldInfo) -> str:
    """Return in words what a key may hold."""
    kind: Any = field.annotation
    limits = field.metadata
    if get_origin(kind) in (Union, UnionType):  # of a key that may be missing: the other type is None
        inner = FieldInfo.from_annotation(get_args(kind)[0])
        kind, limits = inner.annotation, limits + inner.metadata
    for limit in limits:
        if isinstance(limit, Words):
            return limit.text
    if get_origin(kind) is Literal:
        return "text, one of " + ", ".join(repr(value) for value in get_args(kind))
    kinds = {int: "a whole number", float: "a number", bool: "True or False"}
    words = kinds.get(kind, "a mapping of names to values")
    low = next((limit.ge for limit in limits if isinstance(limit, Ge)), None)
    high = next((limit.le for limit in limits if isinstance(limit, Le)), None)
    return words if low is None else f"{words}, from {low:,} to {high:,}"


def _problem(kind: str, location: Sequence[int | str], value: Any, given: Any) -> str:
    """Return the line on one thing that pydantic found.

    Args:
        kind: pydantic's name of it.
        location: where in the config; it also names the type of the environment and what is wrong inside a value.
        value: what stands there.
        given: the whole config.
    """
    keys, field, beside, rest = _find(location)
    key = ".".join(_short(part, bare=True) for part in keys) or "the file"
    if kind.startswith("union_tag"):
        found = f"{_short(value['type'])} should be" if "type" in value else "missing, should be"
        return f"{key}.type: {found} text, one of {', '.join(repr(name) for name in SECTIONS)}"
    if kind == "invalid_key" and not rest:
        return f"{key}: unknown key, keys should be text"
    if field is None and keys:
        return f"{key}: unknown key{_hint(keys, beside, given)}"
    field = field or WHOLE
    inside = ", ".join(fields_of(field))
    if kind == "missing":
        return f"{key}: missing, " + (f"it holds {inside}" if inside else f"should be {describe(field)}")
    if inside:
        return f"{key}: {_short(value)} should be a mapping of keys to values"
    if rest:  # the whole value, not the part of it
        for part in keys:
            value = given = given[part]
    return f"{key}: {_short(value)} should be {describe(field)}"


def _find(location: Sequence[int | str]) -> tuple[list, FieldInfo | None, Mapping[str, FieldInfo], list]:
    """Return the keys to a location, what is declared there and beside it, and what is left inside a value."""
    keys: list[Any] = []
    rest: list[Any] = list(location)
    field: FieldInfo | None = None
    beside = inside = fields_of(WHOLE)
    while rest and inside:
        keys.append(rest.pop(0))
        beside, field = inside, inside.get(keys[-1])
        inside = fields_of(field) if field else {}
        if rest and field and field.discriminator:
            inside = SECTIONS[rest.pop(0)].model_fields
    return keys, field, beside, rest


def _hint(keys: Sequence[Any], beside: Iterable[str], given: Any) -> str:
    """Return what an unknown key may have been meant to be."""
    of_type = ""
    if keys[0] == "environment":
        of_type = f" for type {given['environment']['type']}"
        owners = [name for name, section in SECTIONS.items() if keys[-1] in section.model_fields]
        if owners and len(keys) == 2:
            return f"{of_type}, it belongs to {', '.join(owners)}"
    near = difflib.get_close_matches(keys[-1], beside, 1)
    return f"{of_type}, " + (f"did you mean {near[0]!r}?" if near else f"allowed are {', '.join(beside)}")


def _short(value: object, bare: bool = False) -> str:
    try:
        text = str(value) if bare else repr(value)
    except ValueError:  # Python writes no whole numbers of more than 4,300 digits
        text = "a number of thousands of digits"
    return " ".join(text.split()) if len(text) <= 60 else " ".join(text[:57].split()) + "…"


def _check_rules(config: Config) -> list[str]:
    """Return what is wrong between keys that are fine on their own."""
    problems = []
    transformer = config.transformer
    embed_dim, heads = transformer.embed_dim, transformer.num_heads
    if embed_dim % heads:
        problems.append(f"transformer.embed_dim: {embed_dim} should be divisible by transformer.num_heads, {heads}")
    if embed_dim % 2:
        problems.append(f"transformer.embed_dim: {embed_dim} should be even")
    if transformer.query_position and transformer.positional_encoding == "":
        problems.append(
            "transformer.query_position: True should come with a transformer.positional_encoding: "
            "absolute, learned or relative"
        )
    for name in ("gamma_schedule", "lamda_schedule"):
        schedule = getattr(config, name)
        if schedule is not None and max(schedule.initial, schedule.final) > 1:
            problems.append(f"{name}: {max(schedule.initial, schedule.final)} should be at most 1")
    samples, minibatches = config.n_workers * config.worker_steps, config.n_mini_batch
    if samples % minibatches:
        problems.append(f"n_mini_batch: {minibatches} should divide n_workers·worker_steps, {samples}")
    elif samples == minibatches and config.normalize_advantages:
        problems.append(f"n_mini_batch: {minibatches} leaves one sample, whose advantage cannot be normalised")
    if config.advantage_floor and not config.normalize_advantages:
        problems.append("advantage_floor: is for advantages that are normalised (normalize_advantages: True)")
    return problems
