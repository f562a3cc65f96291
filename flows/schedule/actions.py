"""Which command of `grpo` a firing is."""

from datetime import UTC, datetime
from pathlib import Path

from flows.schedule.spec import Job
from pipeline.files import identity
from pipeline.run_dir import RunDir
from pipeline.runs import is_run, open_run, run_at


def command(job: Job, due: datetime) -> list[str] | None:
    """Return the arguments of `grpo`, None when nothing is new; run in the job's folder. Read-only.

    Raises:
        GrpoError: when the config or the run is wrong.
    """
    overrides = [word for override in job.overrides for word in ("--set", override)]
    match job.action:
        case "continue":
            target = f"iterations={next_target(job)}"
            return ["run", job.config, "--run", job.run, *overrides, "--set", target]
        case "fresh":
            return ["run", job.config, "--run", dated(job.run, due), *overrides]
        case "rescore":
            run = rescored(job)
            return None if run is None else ["rescore", job.run, job.config, "--run", run, *overrides]
        case "audit" | "verify":
            return [job.action, job.run]


def next_target(job: Job) -> int:
    """Return the iterations that the run has after this firing: N more than are finished now."""
    step = job.iterations or _configured(job)
    if not is_run(job.run):
        return step
    run = open_run(job.run)
    return step + max((index + 1 for index in run.iterations() if run.has(index, "policy")), default=0)


def _configured(job: Job) -> int:
    from stages.config import load_config

    return load_config(Path(job.config), job.overrides).iterations


def dated(run: str, due: datetime) -> str:
    """Return the name of a fresh run: that of the schedule with the second, in UTC, at which it was due."""
    return f"{run.rstrip('/')}-{due.astimezone(UTC):%Y%m%d-%H%M%S}"


def rescored(job: Job) -> str | None:
    """Return the run that gets the rewards of today's functions and settings; None when it has all of them.

    Its name ends with their identity: changed rewards make a new run, new completions go on in the one that is there.
    """
    from pipeline.config import apply_overrides, load_toml, validate
    from pipeline.functions import permit, texts_in
    from pipeline.manifest import canonical_json
    from stages.config import config_class, derive_tables, lasting
    from stages.score import find_rewards

    own, source = load_toml(Path(job.config)), open_run(job.run)
    permit(texts_in([own, apply_overrides({}, job.overrides)]))  # the config is the user's
    settings = validate(config_class(), derive_tables(source, own, job.overrides), job.config)
    keeps_rewards = "score" not in apply_overrides(own, job.overrides)
    recipes = {} if keeps_rewards else {reward.name: reward.recipe for reward in find_rewards(settings.score)}
    name = f"{job.run.rstrip('/')}-rescored-{identity(canonical_json([lasting(settings), recipes]))[:8]}"
    return None if _has_all(source, run_at(name)) else name


def _has_all(source: RunDir, run: RunDir) -> bool:
    """Return whether every iteration with completions has its new advantages."""
    stored = [index for index in source.iterations() if source.has(index, "completions")]
    return bool(stored) and all(run.has(index, "advantages") for index in stored)
