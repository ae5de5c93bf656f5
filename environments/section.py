"""What configs are declared with, and what they may say of an environment: a typed section for each type.

The sections lie here and not in the modules of their wrappers: checking a config imports none of the simulators.
"""

import importlib
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_serializer,
    with_config,
)
from pydantic.functional_serializers import SerializerFunctionWrapHandler
from pydantic.json_schema import SkipJsonSchema
from typing_extensions import TypedDict

from environments import MemoryGymType


@dataclass(frozen=True)
class Words:
    """What a value should be, for messages and documentation, where the type does not say it."""

    text: str


def as_number(value: Any) -> Any:
    """Return whole numbers and texts that are numbers as floats, for YAML 1.1 reads 3e-4 as a text."""
    if isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    return value


def refuse(value: None) -> None:
    """Raise a ValueError."""
    raise ValueError("a key that is there has a value")


def odd(value: int) -> int:
    """Return an odd number; ValueError where it is even."""
    if value % 2 == 0:
        raise ValueError("even")
    return value


Whole = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False), BeforeValidator(as_number)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]
Steps = Annotated[Whole, Field(ge=1, le=10**6)]
# What optional keys are where the config does not give them; it cannot say so itself.
Nothing = Annotated[SkipJsonSchema[None], AfterValidator(refuse)]


class Declared(BaseModel):
    """Base of all that is declared: no other keys, no changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def may_be_partial(schema: dict[str, Any]) -> None:
    """Change a JSON schema: which keys a schedule has to give depends on whether it has a default."""
    del schema["required"]


class Schedule(Declared):
    """A value that changes with the updates: (initial − final)·(1 − update/max_decay_steps)^power + final."""

    model_config = ConfigDict(json_schema_extra=may_be_partial)

    initial: Number = Field(ge=0, le=1000, description="The value at the first update.")
    final: Number = Field(ge=0, le=1000, description="The value from update `max_decay_steps` on.")
    power: Number = Field(
        default=1.0, ge=0.01, le=100, description="1 decays evenly, less than 1 later, more than 1 earlier."
    )
    max_decay_steps: Whole = Field(ge=1, le=10**9, description="The update at which the final value is reached.")


StartSeed = Annotated[Whole, Field(ge=0, lt=2**30), Words("a whole number, at least 0")]
SeedCount = Annotated[Whole, Field(ge=1, lt=2**30), Words("a whole number, at least 1")]
# Which seeds training draws from; keys with hyphens cannot be written as a class.
Seeds = TypedDict("Seeds", {"start-seed": StartSeed, "num-seeds": SeedCount}, total=False)
with_config(ConfigDict(extra="forbid"))(Seeds)
TaskOptions = TypedDict("TaskOptions", {"start-seed": StartSeed, "num-seeds": SeedCount}, total=False)
with_config(ConfigDict(extra="allow"))(TaskOptions)

SEEDS = "`start-seed` (default 0) and `num-seeds` (default 100,000): the seeds of training episodes."


class Section(Declared):
    """Base of the sections.

    Attributes:
        wrapper: module and class of the environment, which is constructed from the section and a render mode.
    """

    wrapper: ClassVar[str]
    type: str
    reset_params: Seeds = Field(Seeds(), description=SEEDS)

    @model_serializer(mode="wrap")
    def _leave_out_none(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if value is not None}

    def create(self, render_mode: str | None = None) -> Any:
        """Return a new environment of this section; its module is imported only now.

        Args:
            render_mode: "rgb_array" to be able to call `render`, else None.

        Raises:
            ValueError: if the section names something that does not exist or cannot be played.
            ModuleNotFoundError: if a package that the type needs is not installed.
        """
        module, name = self.wrapper.split(":")
        return getattr(importlib.import_module(module), name)(self, render_mode)


class PocMemorySection(Section):
    """A corridor whose good end is shown only at first."""

    wrapper = "environments.poc_memory_env:PocMemoryEnv"
    type: Literal["PocMemoryEnv"] = Field(description="Which environment.")


class CartPoleSection(Section):
    """CartPole, whose velocities `CartPoleMasked` hides."""

    wrapper = "environments.cartpole_env:CartPole"
    type: Literal["CartPole", "CartPoleMasked"] = Field(description="Which environment.")
    max_episode_steps: Steps = Field(200, description="Episodes are truncated there.")


class MinigridSection(Section):
    """Any environment of MiniGrid or BabyAI, seen as pictures."""

    wrapper = "environments.minigrid_env:MinigridEnv"
    type: Literal["Minigrid"] = Field(description="Which environment.")
    name: Annotated[Text, Words("the registered id of a Minigrid environment")] = Field(
        min_length=1, description="Which of the registered environments."
    )
    max_episode_steps: Steps | Nothing = Field(
        None, description="Episodes are truncated there: by default at 96 for Memory tasks, else at 64."
    )
    view_size: (
        Annotated[Whole, Field(ge=3, le=99), AfterValidator(odd), Words("a whole number, odd, from 3 to 99")] | Nothing
    ) = Field(None, description="Tiles along each side of the view: by default 3 for Memory tasks, else 7.")
    tile_size: Annotated[Whole, Field(ge=1, le=64)] | Nothing = Field(
        None, description="Pixels per tile: by default 28 for Memory tasks, else 8."
    )
    num_actions: Annotated[Whole, Field(ge=1, le=7)] | Nothing = Field(
        None, description="The first so many of MiniGrid's actions: by default 3 for Memory tasks, else all."
    )
    mission: Flag = Field(False, description="The mission's words are observed as a vector beside the picture.")


class MemoryGymSection(Section):
    """The tasks of Memory Gym."""

    wrapper = "environments.memory_gym_env:MemoryGymEnv"
    type: MemoryGymType = Field(description="Which environment.")
    reset_params: TaskOptions = Field(  # type: ignore[assignment]  # more keys, beside the same ones
        TaskOptions(), description=f"The task's own options, and {SEEDS}"
    )

    @property
    def options(self) -> dict[str, Any]:
        """Return the reset options of the task."""
        return {key: value for key, value in self.reset_params.items() if key not in Seeds.__annotations__}


class GymnasiumSection(Section):
    """Any environment that is registered with Gymnasium."""

    wrapper = "environments.gymnasium_env:GymnasiumEnv"
    type: Literal["Gymnasium"] = Field(description="Which environment.")
    name: Annotated[Text, Words("the registered id of a Gymnasium environment")] = Field(
        min_length=1, description="The registered id; `package.module:Id-v0` imports the module first."
    )
    max_episode_steps: Steps | Nothing = Field(
        None, description="Episodes are truncated there: by default where the environment says."
    )
    arguments: dict[Text, Any] = Field({}, description="Passed on to `gymnasium.make`.")
    observe: Annotated[list[Text], Field(min_length=1), Words("a list of names")] | Nothing = Field(
        None, description="Which entries of a Dict space are observed: by default all."
    )
    hide: Annotated[
        list[Whole | Annotated[str, Field(strict=True, pattern=r"^(-?\d+)?:(-?\d+)?$")]],
        Words('a list of indices and slices, such as [1, "3:5"]'),
    ] = Field([], description="Entries of the observed vector that are set to zero.")
    previous_action: Flag = Field(False, description="The previous action is appended to the observed vector.")
    previous_reward: Flag = Field(False, description="The previous reward is appended to the observed vector.")
    reward_scale: Number = Field(
        1.0, ge=1e-6, le=10**6, description="Rewards are multiplied by it for learning, not for what is reported."
    )


Environment = Annotated[
    PocMemorySection | CartPoleSection | MinigridSection | MemoryGymSection | GymnasiumSection,
    Field(discriminator="type"),
]
