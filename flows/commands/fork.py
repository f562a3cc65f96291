"""`grpo fork`: a new run from a policy of another one."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from flows.commands.options import Config, NewRun, NoPrefect, Overrides, Run, Trust, named_after, permit_named
from pipeline.artifact import open_artifact
from pipeline.errors import ArtifactMissing, ConfigError, UsageError
from pipeline.files import write_text
from pipeline.functions import permit
from pipeline.manifest import is_finished
from pipeline.run_dir import RunDir
from pipeline.runs import open_run, run_at

WRITES = True


def fork(
    run: Run,
    config: Config,
    at: Annotated[int, typer.Option("--at", min=0, help="Start from the policy after so many updates.")],
    new: NewRun = None,
    offline: Annotated[
        int | None,
        typer.Option("--offline", min=0, help="Stored iterations to train on first; default: all from --at on."),
    ] = None,
    overrides: Overrides = None,
    trust: Trust = False,
    no_prefect: NoPrefect = False,
) -> None:
    """Start a new run from a policy of another one: first on its stored completions, then generating.

    CONFIG has the tables that replace those of RUN, for example new rewards. The same command continues.

    Example: grpo fork runs/demo configs/terse.toml --at 20 --offline 5
    """
    from flows.environment import prepare_environment

    prepare_environment(with_prefect=not no_prefect)
    from flows.commands.run import train
    from flows.prepare import check
    from pipeline.config import load_toml, validate
    from stages.config import config_class

    own = load_toml(config)
    permit_named(own, overrides, is_trusted=trust)
    source, place = open_run(run), run_at(new or named_after(run, f"{config.stem}-{at}"))
    is_begun = is_finished(place.initial_policy)
    tables = fork_tables(source, at, own, offline, overrides or [], is_begun=is_begun)
    permit([source.name, source.shown(source.policy_before(at))])  # the user has named that run
    toml = fork_toml(source, at, tables)
    prepared = check(validate(config_class(), tables, str(config)), place, toml)
    place.root.mkdir(parents=True, exist_ok=True)
    write_text(place.root / "fork.toml", toml)
    train(prepared, place.root / "fork.toml", None, with_prefect=not no_prefect)


def fork_tables(
    source: RunDir,
    at: int,
    own: Mapping[str, Any],
    offline: int | None,
    overrides: list[str],
    *,
    is_begun: bool = False,
) -> dict[str, object]:
    """Return the tables of a run that starts from the policy after ``at`` updates of another one.

    It trains first on that run's stored completions from iteration ``at`` on (``offline`` of them, all by default),
    unless ``own``, the tables of the fork's config, has [[offline]], and then generates.

    Raises:
        GrpoError: when the policy or the completions do not exist, or the config is wrong.
    """
    from pipeline.config import apply_overrides, without_nulls
    from stages.config import OfflineConfig, derive_tables
    from stages.optimizer import state_beside

    tables = derive_tables(source, own, overrides)
    wished = apply_overrides(own, overrides)
    if "offline" not in wished:
        tables.pop("offline", None)  # the fork has its own offline iterations
    policy = source.policy_before(at)
    if not is_finished(policy):
        raise ArtifactMissing(
            f"{source.name} has no policy after {at} updates ({policy} does not exist): choose --at among those of "
            f"`grpo ls {source.name}`"
        )
    if not is_begun:  # else the fork has its own copy
        open_artifact(policy).check_sizes()  # raises if it was pruned
    own = {key: value for key, value in wished.get("policy", {}).items() if key == "keep_optimizer"}
    tables["policy"] = {"model": source.shown(policy) if source.copy else str(policy.resolve()), **own}
    if at and own.get("keep_optimizer", True) and not is_begun:
        state_beside(open_artifact(policy)).check_sizes()
    tables.pop("starter", None)
    if "tracking" not in wished:
        tables.pop("tracking", None)  # whom to tell is the choice of whoever forks
    if not tables.get("offline"):
        stored = [index for index in source.iterations() if index >= at and source.has(index, "completions")]
        chosen = stored if offline is None else stored[:offline]
        if offline and len(chosen) < offline:
            raise ConfigError(
                f"--offline {offline} wants as many stored iterations of {source.name} from {at} on, there are "
                f"{len(stored)}: lower it, or list others under [[offline]] in the config"
            )
        where = source.name if source.copy else str(source.root.resolve())
        tables["offline"] = [OfflineConfig(run=where, iterations=chosen).model_dump()] if chosen else []
    elif offline is not None:
        raise UsageError(f"the config has [[offline]] and the command --offline {offline}: leave one of them out")
    return without_nulls(tables)


def fork_toml(source: RunDir, at: int, tables: dict[str, object]) -> str:
    """Return the fork's config as TOML; `grpo run` with it continues the fork."""
    import tomli_w

    header = f"# {source.name} after {at} updates, with the tables of another config in place of its own\n"
    return header + tomli_w.dumps(tables)
