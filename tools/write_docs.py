"""What is declared of configs as texts: the tables of docs/configuration.md, and configs/schema.json for editors."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from environments import MEMORY_GYM_TYPES, SECTIONS
from environments.memory_gym_env import make_task
from run.config import Config

ROOT = Path(__file__).parents[1]
HEAD = "\n| key | value | default | meaning |\n|---|---|---|---|"
PAGE = ROOT / "docs" / "configuration.md"
PARTS = {"transformer": "TransformerConfig", "recurrence": "RecurrenceConfig", "memoryless": "MemorylessConfig",
         "…_schedule": "Schedule"}  # fmt: skip


def documentation() -> str:
    """Return docs/configuration.md, which stays as it is above its first table."""
    schema = Config.model_json_schema()
    parts = schema["$defs"]
    lines = [PAGE.read_text(encoding="utf-8").partition(HEAD)[0] + HEAD, *rows(schema)]
    for name, part in PARTS.items():
        lines += rows(parts[part], f"{name}.")
    lines += ["\n## `environment`", HEAD]
    for section in dict.fromkeys(SECTIONS.values()):
        names = ", ".join(f"`{name}`" for name, one in SECTIONS.items() if one is section)
        lines += [f"| **`type`** | {names} | | {section.__doc__} |", *rows(parts[section.__name__])]
    lines += ["\n| `type` | its own entries of `reset_params` and their defaults |", "|---|---|"]
    for name in MEMORY_GYM_TYPES:
        options = make_task(name).default_reset_parameters
        lines.append(f"| `{name}` | {', '.join(f'{key} {value}' for key, value in options.items())} |")
    return "\n".join(lines) + "\n"


def rows(schema: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Yield a row for each key of a JSON schema; the `type` of an environment is left out."""
    for key, found in schema["properties"].items():
        if key != "type":
            name = f"**`{prefix}{key}`**" if key in schema.get("required", []) else f"`{prefix}{key}`"
            default = "" if found.get("default") is None else f"`{found['default']}`".replace("'", "")
            yield f"| {name} | {kind(found)} | {default} | {found.get('description', '')} |"


def kind(found: dict[str, Any]) -> str:
    """Return in words what a JSON schema allows."""
    if "enum" in found:
        return " or ".join(f"`{value!r}`" for value in found["enum"])
    if "anyOf" in found:
        return " or ".join(kind(one) for one in found["anyOf"] if one.get("type") != "null")
    limits = [f"{found[name]:,}" for name in ("minimum", "maximum") if name in found]
    return found.get("type", "section") + f", {' to '.join(limits)}" * bool(limits)


def json_schema() -> str:
    """Return configs/schema.json."""
    return json.dumps(Config.model_json_schema(), indent=2, ensure_ascii=False) + "\n"


FILES = {PAGE: documentation, ROOT / "configs" / "schema.json": json_schema}

if __name__ == "__main__":
    for path, text in FILES.items():
        path.write_text(text(), encoding="utf-8")
        print(f"Wrote {path.relative_to(ROOT)}")
