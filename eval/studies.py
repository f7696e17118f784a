"""What quantization leaves in a bundle for the report: sensitivity, timestep_error and search.json, checked on reading.

The formats are JSON schemas in this folder and are explained in docs/evaluation.md.
"""

from __future__ import annotations

import json
import textwrap
from importlib import resources
from pathlib import Path
from typing import Any

from ldm_deploy.errors import EvaluationError

STUDIES = ("sensitivity", "timestep_error", "search")


def study_schema(name: str) -> dict[str, Any]:
    """The JSON schema of one of `STUDIES`."""
    text = (resources.files("ldm_deploy.eval") / f"{name}.schema.json").read_text("utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def check_study(name: str, content: Any, where: str) -> None:
    """Raises `EvaluationError` unless `content` has the format of `name`, one of `STUDIES`; `where` names its file."""
    import jsonschema

    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(study_schema(name)).iter_errors(content))
    if error is not None:
        # jsonschema names the value, except where one value alone is allowed.
        found = f"{error.instance!r}, allowed: {error.validator_value}" if error.validator == "const" else error.message
        message = textwrap.shorten(found, 200, placeholder=" …")
        raise EvaluationError(
            f"{where}: {error.json_path} is wrong: {message}; the format is in docs/evaluation.md: "
            "write the file again, or remove it from the bundle"
        )


def read_studies(bundle: Path) -> dict[str, Any]:
    """The content of each of `STUDIES` that the directory has, by name.

    Raises `EvaluationError` for a file that is no JSON, holds NaN or infinity, or has another format.
    """
    found = {}
    for name in STUDIES:
        path = Path(bundle) / f"{name}.json"
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
        except (OSError, ValueError) as error:
            raise EvaluationError(f"{path} cannot be read: {error}; write it again, or remove it") from None
        check_study(name, content, str(path))
        found[name] = content
    return found


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number; a figure that is missing is null, with its reason")
