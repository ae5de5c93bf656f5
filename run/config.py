"""Configs: what may stand in them, and every mistake found before anything starts.

`python -m tools.write_docs` writes configs/schema.json and docs/configuration.md from what is declared.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator

from environments import SECTIONS, Environment
from environments.section import Flag, Number, Schedule, Section, Whole, not_a_flag
from model import ModelConfig
from run.cli import problems
from utils import UserError, polynomial_decay

Count = Annotated[Whole, Field(ge=1, le=10**9)]
Interval = Annotated[Whole, Field(ge=0, le=10**9)]
Coefficient = Annotated[float, Field(allow_inf_nan=False, ge=0, le=1000), not_a_flag]


class Config(ModelConfig):
    """Everything that a training depends on, but for its seed."""

    environment: Environment = Field(description="What is played: one of the sections below, told apart by `type`.")
    gamma: Number = Field(0.995, ge=0, le=1, description="Discount of future rewards.")
    lamda: Number = Field(0.95, ge=0, le=1, description="λ of the generalised advantage estimation.")
    updates: Count = Field(description="Updates of the run, each of `n_workers`·`worker_steps` environment steps.")
    epochs: Whole = Field(3, ge=1, le=1000, description="Passes over the rollout per update.")
    n_workers: Whole = Field(ge=1, le=4096, description="Environments.")
    worker_steps: Whole = Field(ge=1, le=10**5, description="Steps of each environment per update.")
    n_mini_batch: Whole = Field(8, ge=1, le=10**6, description="Minibatches; divides `n_workers`·`worker_steps`.")
    segment_length: Whole = Field(
        1, ge=1, le=10**5, description="Steps learned from together, with gradients through memory."
    )
    value_loss_coefficient: Coefficient = Field(0.5, description="Weight of the value loss (squared error without ½).")
    max_grad_norm: Number = Field(0.25, ge=1e-6, le=10**6, description="All gradients are clipped to this norm.")
    amsgrad: Flag = Field(False, description="Second moments of AdamW never fall (Reddi et al. 2018).")
    kl_limit: Coefficient = Field(0.0, description="Limit of the acting policy's KL (root mean square); 0 is none.")
    normalize_advantages: Flag = Field(True, description="Advantages are normalised in each minibatch.")
    advantage_floor: Number = Field(
        0.0, ge=0, le=10**6, description="Least divisor in normalising (Hafner et al. 2023)."
    )
    reconstruction_coefficient: Coefficient = Field(0.0, description="Weight of reconstructing the frame from memory.")
    recall_coefficient: Coefficient = Field(
        0.0, description="Weight of the loss of recognising which frames the episode has shown."
    )
    prediction_coefficient: Coefficient = Field(
        0.0, description="Weight of the loss of predicting the next frame or vector."
    )
    checkpoint_interval: Count = Field(50, description="Updates between checkpoints.")
    model_interval: Interval = Field(0, description="Updates between models kept in `checkpoints/<id>/`; 0 is never.")
    eval_interval: Interval = Field(0, description="Updates between evaluations beside the training; 0 is never.")
    video_interval: Interval = Field(0, description="Updates between episodes drawn for TensorBoard; 0 is never.")
    histogram_interval: Interval = Field(0, description="Updates between histograms of the weights; 0 is never.")
    gamma_schedule: Schedule | None = Field(None, description="Replaces `gamma` (François-Lavet et al. 2015).")
    lamda_schedule: Schedule | None = Field(None, description="Replaces `lamda`.")
    learning_rate_schedule: Schedule = Field(description="Learning rate of AdamW.")
    beta_schedule: Schedule = Field(
        Schedule(initial=1e-4, final=1e-6, max_decay_steps=10000), description="Coefficient of the entropy bonus."
    )
    clip_range_schedule: Schedule = Field(
        Schedule(initial=0.1, final=0.1, max_decay_steps=10000),
        description="ε, the clip range of ratio and value.",
    )
    novelty_schedule: Schedule = Field(
        Schedule(initial=0.0, final=0.0, max_decay_steps=1),
        description="Added to the training reward for an observation that the episode has not shown yet, byte by byte.",
    )

    @property
    def samples(self) -> int:
        """Environment steps of one update."""
        return self.n_workers * self.worker_steps

    def scheduled(self, name: str, update: int) -> float:
        """Return what `name`, such as gamma, is after a number of finished updates: by its schedule, if it has one."""
        schedule = getattr(self, f"{name}_schedule")
        return getattr(self, name) if schedule is None else polynomial_decay(schedule, update)

    @field_validator("beta_schedule", "clip_range_schedule", "novelty_schedule", mode="before")
    @classmethod
    def _complete(cls, given: Any, field: ValidationInfo) -> Any:
        """Let a schedule with a default be changed in part."""
        return cls.model_fields[field.field_name].default.model_dump() | given if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _check_rules(self) -> "Config":
        """Raise ValueError with a line for each thing that is wrong between keys that are fine on their own."""
        if wrong := [text for broken, text in self._rules() if broken]:
            raise ValueError("\n".join(wrong))
        return self

    def _rules(self) -> Iterator[tuple[bool, str]]:
        """Yield whether a rule is broken, and what it says."""
        cores = [name for name in ("transformer", "recurrence", "memoryless") if getattr(self, name) is not None]
        yield len(cores) != 1, "exactly one of transformer, recurrence and memoryless has to be given"
        if self.transformer is not None:
            width, heads = self.transformer.embed_dim, self.transformer.num_heads
            yield width % heads > 0, f"transformer.embed_dim: {width} should be divisible by num_heads, {heads}"
            yield width % 2 > 0, f"transformer.embed_dim: {width} should be even"
            lost = self.transformer.query_position and not self.transformer.positional_encoding
            yield lost, "transformer.query_position: needs a positional_encoding"
        for name in ("gamma_schedule", "lamda_schedule"):
            schedule = getattr(self, name)
            yield schedule is not None and max(schedule.initial, schedule.final) > 1, f"{name}: should be at most 1"
        count, length, minibatches = self.samples, self.segment_length, self.n_mini_batch
        yield count % minibatches > 0, f"n_mini_batch: {minibatches} should divide n_workers·worker_steps, {count}"
        size = count // minibatches
        yield size == 1 and self.normalize_advantages, "n_mini_batch: advantages of single samples cannot be normalised"
        broken, steps = self.worker_steps % length + size % length > 0, self.worker_steps
        yield broken, f"segment_length: {length} should divide worker_steps, {steps}, and a minibatch, {size}"
        floor = self.advantage_floor > 0 and not self.normalize_advantages
        yield floor, "advantage_floor: is for advantages that are normalised (normalize_advantages: True)"


class Loader(yaml.SafeLoader):
    """YAML without keys that are there twice, of which all but the last are lost."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if again := sorted({key for key in keys if keys.count(key) > 1}):
            raise yaml.YAMLError(f"duplicate keys: {', '.join(again)}")
        return super().construct_mapping(node, deep)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check a YAML config, with overrides such as "transformer.num_blocks=2"; the value is YAML.

    UserError names all that is wrong with it, a line each.
    """
    try:
        given = _parse(Path(path).read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from error
    for override in overrides:
        _override(given, override)
    return check_config(given, f"{path} with --set" if overrides else str(path))


def check_config(given: object, source: str) -> Config:
    """Return a config with every default filled in; UserError names its source and all that is wrong, a line each."""
    try:
        return Config.model_validate(given)
    except ValidationError as error:
        section = given.get("environment") if isinstance(given, dict) else None
        kind = SECTIONS.get(str(section.get("type"))) if isinstance(section, dict) else None
        known = [*known_keys(Config), *known_keys(kind or Section, "environment.")]
        raise UserError("\n".join(f"{source}: {line}" for line in problems(error, given, known))) from error


def known_keys(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of what is declared in a model and in those inside it, sections of environments aside."""
    for key, field in kind.model_fields.items():
        yield prefix + key
        for inner in () if field.discriminator else (field.annotation, *get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from known_keys(inner, f"{prefix}{key}.")


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date
        raise UserError(f"{source}: is not valid YAML: {' '.join(str(error).split())}") from error


def _override(given: Any, override: str) -> None:
    """Change one key of what a file says."""
    name, equals, text = override.partition("=")
    if not equals or "" in name.split("."):
        raise UserError(f"--set {override}: should be key=value, as in transformer.num_blocks=2")
    *path, last = name.split(".")
    try:
        for key in path:
            given = given.setdefault(key, {})
        given[last] = _parse(text, f"--set {override}")
    except (AttributeError, TypeError) as error:  # what it would be a key of has none
        raise UserError(f"--set {name}: is not a key of a section") from error
