"""What configs are declared with: numbers, texts, schedules, and the base of the sections on environments.

Each section lies beside its environment. Checking a config imports none of the simulators.
"""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_serializer, with_config
from pydantic.functional_serializers import SerializerFunctionWrapHandler
from pydantic.json_schema import SkipJsonSchema
from typing_extensions import TypedDict


def as_number(value: Any) -> Any:
    """Return whole numbers and texts that are numbers as floats, for YAML 1.1 reads 3e-4 as a text."""
    if isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    return value


Whole = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False), BeforeValidator(as_number)]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]
Steps = Annotated[Whole, Field(ge=1, le=10**6)]
# What optional keys are where the config does not give them.
Nothing = SkipJsonSchema[None]


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


StartSeed = Annotated[Whole, Field(ge=0, lt=2**30)]
SeedCount = Annotated[Whole, Field(ge=1, lt=2**30)]
# Which seeds training draws from; keys with hyphens cannot be written as a class.
Seeds = TypedDict("Seeds", {"start-seed": StartSeed, "num-seeds": SeedCount}, total=False)
with_config(ConfigDict(extra="forbid"))(Seeds)
SEEDS = "`start-seed` (default 0) and `num-seeds` (default 100,000): the seeds of training episodes."


class Section(Declared):
    """Base of the sections: what a config says of its environment."""

    type: str
    reset_params: Seeds = Field(Seeds(), description=SEEDS)

    @model_serializer(mode="wrap")
    def _leave_out_none(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if value is not None}

    def create(self, render_mode: str | None = None) -> Any:
        """Return a new `GymnasiumEnv`; its simulator is imported only now. See `utils.create_env`."""
        raise NotImplementedError
