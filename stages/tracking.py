"""The table [tracking]: which experiment trackers are told of a run while it goes on."""

from importlib.util import find_spec
from typing import Literal

from pydantic import Field

from pipeline.config import Name, StrictModel
from pipeline.errors import ConfigError

TrackerName = Literal["trackio", "tensorboard", "wandb", "mlflow"]
"""Each is also the name of the library that it needs, and of the extra that installs it."""


class TrackingConfig(StrictModel):
    """Experiment trackers. Decides no result, so it is in no recipe."""

    to: list[TrackerName] = Field(min_length=1)
    """The trackers that are told of every iteration."""
    project: str = Field("grpo", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Project of the run; in MLflow the experiment."""
    name: Name | None = None
    """Name of the run there; null = the name of its folder."""
    groups: int = Field(2, ge=0)
    """Groups of every iteration whose completions are logged, chosen as `grpo report` does; 0 = none."""


def check_installed(config: TrackingConfig) -> None:
    """Check that the trackers' libraries are installed, without importing them. Read-only.

    Raises:
        ConfigError: naming those that are not.
    """
    missing = [name for name in dict.fromkeys(config.to) if not _is_installed(name)]
    if missing:
        extras = ",".join(missing)
        raise ConfigError(
            f"tracking.to names {' and '.join(missing)}, not installed here: give `pip install "
            f"'grpo-pipeline[{extras}]'`, or take {'it' if len(missing) == 1 else 'them'} from the list"
        )


def _is_installed(library: str) -> bool:
    found = find_spec(library)
    return found is not None and found.origin is not None  # a folder `wandb` of the current directory has none
