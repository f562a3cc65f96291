"""The base of config tables that this package takes. Imports neither torch nor transformers."""

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """Base of every table: as strict as the one of `pipeline.config`, which this package does not import."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
