"""The base of config tables that this package takes. Imports neither torch nor transformers."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class StrictModel(BaseModel):
    """Base of every table: as strict as the one of `pipeline.config`, which this package does not import."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _none_is_null(value: Any) -> Any:
    """Return null for the text none."""
    return None if value == "none" else value


PositiveOrNone = Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(_none_is_null)]
"""A setting that is on by default: TOML has no null to switch it off with, so a config may say "none"."""
