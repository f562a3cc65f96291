"""The base of config tables that this package takes. Imports neither torch nor transformers."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer


class StrictModel(BaseModel):
    """Base of every table: as strict as the one of `pipeline.config`, which this package does not import."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


def _none_is_null(value: Any) -> Any:
    """Return null for the text none."""
    return None if value == "none" else value


def _null_is_none(value: Any) -> Any:
    """Return the text none for null."""
    return "none" if value is None else value


NoneIsNull = BeforeValidator(_none_is_null)
"""For a setting that a preset may have on: TOML has no null to switch it off with, so a config says "none"."""
OrNone = (NoneIsNull, PlainSerializer(_null_is_none, when_used="json"))
"""For a setting that is on by default. TOML has no null to switch it off with: a config says "none". A recorded config
says it as well, since a run made of it would have the default in the place of a null."""
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
PositiveOrNone = Annotated[Positive | None, *OrNone]
TextOrNone = Annotated[Annotated[str, Field(min_length=1)] | None, *OrNone]
