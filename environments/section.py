"""What configs are declared with: numbers, texts, schedules, and the base of the sections on environments.

Each section lies beside its environment. Checking a config imports none of the simulators.
"""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_serializer, with_config
from pydantic.functional_serializers import SerializerFunctionWrapHandler
from pydantic.json_schema import SkipJsonSchema
from typing_extensions import TypedDict

Whole = Annotated[int, Field(strict=True)]
# Numbers may also be given as text, because YAML 1.1 reads 3e-4 as text; True is not accepted as 1.
not_a_flag = BeforeValidator(lambda value: str(value) if isinstance(value, bool) else value)
Number = Annotated[float, Field(allow_inf_nan=False), not_a_flag]
Flag = Annotated[bool, Field(strict=True)]
Text = Annotated[str, Field(strict=True)]
Steps = Annotated[Whole, Field(ge=1, le=10**6)]
# What optional keys are where the config does not give them.
Nothing = SkipJsonSchema[None]


class Declared(BaseModel):
    """Base of all that is declared: no other keys, no changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Schedule(Declared):
    """A value that changes with the updates: (initial − final)·(1 − update/max_decay_steps)^power + final."""

    # Which keys a config has to give depends on whether the schedule has a default.
    model_config = ConfigDict(json_schema_extra=lambda schema: schema.pop("required"))

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
