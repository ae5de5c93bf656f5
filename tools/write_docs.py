"""What is declared of configs as texts: docs/configuration.md to read, configs/schema.json for editors."""

import json
from collections.abc import Mapping
from pathlib import Path

from pydantic.fields import FieldInfo

from environments import MEMORY_GYM_TYPES
from environments.memory_gym_env import make_task
from environments.section import Schedule
from run.config import SECTIONS, Config, describe, fields_of

ROOT = Path(__file__).parents[1]
INTRODUCTION = """# Configuration

<!-- Written by `python -m tools.write_docs` from the declarations in run/config.py and environments/section.py. -->

A config is a YAML file such as those in `configs/`. It says what is played, what has to be given, and what differs from
the defaults below. Everything is checked before anything starts; every mistake is named, with the nearest known key.
Each key can be changed on the command line, as often as needed, by a value in YAML:

    python train.py --config=configs/minigrid.yaml --set updates=200 --set transformer.num_blocks=2

Editors that read the first line of a config (`# yaml-language-server: …`) complete and check keys while one types."""


def documentation() -> str:
    """Return docs/configuration.md."""
    keys = dict(Config.model_fields)
    transformer = {f"transformer.{key}": field for key, field in fields_of(keys.pop("transformer")).items()}
    schedules = f"{Schedule.__doc__} A schedule that has a default may be given in part."
    parts = ["## Keys", table(keys), table(transformer), "## Schedules", schedules, table(Schedule.model_fields)]
    parts += ["## Environments", "A key that a type does not have is refused."]
    for section in dict.fromkeys(SECTIONS.values()):
        names = ", ".join(f"`{name}`" for name, one in SECTIONS.items() if one is section)
        fields = {f"environment.{key}": field for key, field in section.model_fields.items() if key != "type"}
        parts += [f"### {names}", str(section.__doc__), table(fields)]
    return "\n\n".join([INTRODUCTION, *parts, "### Reset options of Memory Gym", reset_options()]) + "\n"


def table(fields: Mapping[str, FieldInfo]) -> str:
    """Return a table of keys."""
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key, field in fields.items():
        inside = "a mapping of " + ", ".join(f"`{name}`" for name in fields_of(field))
        rows.append(
            f"| `{key}` | {inside if fields_of(field) else describe(field)} | {default(field)} | {field.description} |"
        )
    return "\n".join(rows)


def default(field: FieldInfo) -> str:
    """Return the default of a key, nothing where its meaning says what holds without it."""
    if field.is_required() or field.default is None:
        return "has to be given" if field.is_required() else ""
    value = field.default.model_dump() if isinstance(field.default, Schedule) else field.default
    return f"`{value}`".replace("'", "")


def reset_options() -> str:
    """Return the table of Memory Gym's own options."""
    rows = ["| `type` | entries of `reset_params` and their defaults |", "|---|---|"]
    for name in MEMORY_GYM_TYPES:
        options = make_task(name).default_reset_parameters
        rows.append(f"| `{name}` | {', '.join(f'{key} {value}' for key, value in options.items())} |")
    return "\n".join(rows)


def json_schema() -> str:
    """Return configs/schema.json."""
    return json.dumps(Config.model_json_schema(), indent=2, ensure_ascii=False) + "\n"


FILES = {ROOT / "docs" / "configuration.md": documentation, ROOT / "configs" / "schema.json": json_schema}

if __name__ == "__main__":
    for path, text in FILES.items():
        path.write_text(text(), encoding="utf-8")
        print(f"Wrote {path.relative_to(ROOT)}")
