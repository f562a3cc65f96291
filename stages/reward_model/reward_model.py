"""reward_model: preferences -> a reward model, which the reward `preference_score` uses, and the rows that made it.

AutoModelForSequenceClassification loads the artifact ``reward_model`` as it is; ``preferences_used`` next to it has
every preference that was given, with the reason where it did not train. A refresh begins with an earlier reward
model and mixes a share of its preferences into the new ones, as iterative GRPO does (arXiv:2402.03300, Algorithm 1).
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import polars as pl
from pydantic import Field, model_validator

from grpo.settings import AdamWConfig
from grpo.strict import PositiveOrNone
from pipeline.artifact import Artifact, open_artifact
from pipeline.config import StrictModel, apply_overrides, load_toml, validate
from pipeline.errors import ConfigError, GrpoError, PolicyError, SourceError
from pipeline.files import WRITER_LOCK, identity, locked, sha256_text
from pipeline.manifest import canonical_json, is_finished
from pipeline.stage import Progress, Stage, StageCall, StageResult, StageTask, run_stage, silent
from stages.checkpoints import context_length, copy_tokenizer, is_causal, looks_local
from stages.reward_model.preferences import (
    Preferences,
    draw_replay,
    older_rows,
    preference_frame,
    read_preferences,
    without_duplicates,
)
from stages.rewards.models.model_identity import model_identity, model_source
from stages.rewards.models.preference_model import encode_answer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from stages.reward_model.preference_loss import Pair, PreferenceStep

REWARD_MODEL = "reward_model"
USED = "preferences_used"
OUTPUTS = (USED, REWARD_MODEL)
REPORT = "training.json"
"""File next to the weights: losses, and the accuracies on trained and on held-out pairs."""

BETA2 = 0.999
"""Of AdamW; an update has another default. Fixed, so that the same preferences keep giving the same model."""

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}{{ eos_token or '' }}"
)
"""Given to a causal base without chat template, so that training and scoring write conversations alike."""


class RewardModelConfig(StrictModel):
    """Config of a reward model: the table [reward_model] of a file of its own."""

    base: str = Field(min_length=1)
    """Path or hub name of a causal language model, which gets a new head, or of an earlier reward model to refresh."""
    revision: str | None = None
    """Commit of a hub model; required for one."""
    preferences: list[str] = Field(min_length=1)
    """Files of new preferences: .jsonl, .csv or .parquet; see docs/reward_models.md for their columns."""
    runs: list[str] = Field(default_factory=list)
    """Run directories that hold the completions that chosen_id and rejected_id name."""
    older: list[str] = Field(default_factory=list)
    """Files of older preferences to replay from; those of an earlier reward model need not be named."""
    replay_share: float = Field(0.1, ge=0, le=1)
    """Share of the older preferences that trains again."""
    held_out_share: float = Field(0.1, ge=0, lt=1)
    """Share of the questions whose preferences only test; by the same hash as evaluate.held_out_share."""
    seed: int = Field(0, ge=0)
    """Of the new head, the order of the pairs and the replay."""
    epochs: int = Field(1, ge=1)
    """Times that each pair trains."""
    batch_size: int = Field(64, ge=1)
    """Pairs per optimizer step."""
    pairs_per_forward: int = Field(8, ge=1)
    """Pairs whose activations exist at the same time."""
    learning_rate: float = Field(1e-5, gt=0)
    """Peak of AdamW's learning rate."""
    warmup_steps: int = Field(0, ge=0)
    """Optimizer steps over which it rises."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up: constant, or falling to 0 at the last step."""
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: PositiveOrNone = 1.0
    """Longer gradients are shortened to this; "none" leaves them."""
    margin: float = 0.0
    """By how much the chosen reward is to exceed the other where the file has no margin."""
    centering: float = Field(0.01, ge=0)
    """Weight of (r_chosen + r_rejected)^2, which keeps rewards around 0."""
    max_tokens: int | None = Field(None, ge=1)
    """Longest conversation with its answer; pairs over it are dropped, never cut. null = the model's context."""
    num_threads: int = Field(2, ge=1)
    """CPU threads; they change the bits of the result."""

    @model_validator(mode="after")
    def _head_of_a_hub_model(self) -> Self:
        if self.revision is not None and looks_local(self.base):
            raise ValueError(f"base {self.base!r} is a directory, which has no revision: leave revision out")
        return self

    def adamw(self, num_pairs: int) -> AdamWConfig:
        """Return the optimizer's config for so many pairs.

        Raises:
            ConfigError: when the warm-up takes all steps.
        """
        total_steps = self.epochs * math.ceil(num_pairs / self.batch_size)
        if self.schedule != "constant" and self.warmup_steps >= total_steps:
            raise ConfigError(
                f"reward_model.warmup_steps is {self.warmup_steps}, and {num_pairs} pairs make {total_steps} steps: "
                "expected fewer steps of warm-up than there are; lower it, or raise epochs"
            )
        return AdamWConfig(
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            schedule=self.schedule,
            total_steps=total_steps,
            beta2=BETA2,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
        )


class RewardModelFile(StrictModel):
    """The file that `grpo reward-model` reads."""

    reward_model: RewardModelConfig


@dataclass(frozen=True, slots=True)
class Material:
    """Input of the stage, gathered before it is known whether it must run."""

    source: str
    """What transformers loads the base from."""
    rows: list[dict[str, Any]]
    undecided: int
    device: str


def load_reward_model_config(path: Path, overrides: list[str] | None = None) -> RewardModelConfig:
    """Return the validated table [reward_model] of a TOML file with ``key=value`` overrides. Read-only."""
    return validate(RewardModelFile, apply_overrides(load_toml(path), overrides or []), str(path)).reward_model


def train_reward_model(
    config: RewardModelConfig, root: Path, progress: Progress = silent, *, device: str = "cpu"
) -> StageResult:
    """Return the artifacts preferences_used and reward_model below ``root``; they are made only if missing.

    The result is a pure function of the settings, the base's bytes and the preferences, whatever their paths; on CPU
    bit for bit. Puts torch into deterministic mode for this process when it trains.

    Raises:
        SourceError: when a preference is ambiguous, or none is left to train on.
        ConfigError, PolicyError: when the base is unknown or cannot be given a reward head.
    """
    inputs, parameters, history = _base(config)
    new = _read(config, config.preferences, "new")
    older = older_rows(history) if history else []
    extra = _read(config, config.older, "older") if config.older else Preferences([])
    # A question that once trained must not test, and the other way round: older rows keep their role.
    rows = draw_replay(without_duplicates([*new.rows, *older, *extra.rows]), config.replay_share, config.seed)
    parameters = {**parameters, "rows_sha256": sha256_text(canonical_json(rows))}
    inputs = {**inputs, **new.completions, **extra.completions}
    by_digest = {
        "base": config.base if not looks_local(config.base) else "local",
        "preferences": [],
        "runs": [],
        "older": [],
    }
    call = StageCall(STAGE, config.model_copy(update=by_digest), inputs, dict.fromkeys(OUTPUTS, root), parameters)
    material = Material(model_source(config.base), rows, new.undecided + extra.undecided, device)
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / WRITER_LOCK):  # of two processes that need the same model the second waits, and finds it
        place = root / call.recipe()[:12]
        place.mkdir(exist_ok=True)
        call = replace(call, places={name: place / name for name in OUTPUTS})
        return run_stage(call, material, progress)


def _base(config: RewardModelConfig) -> tuple[dict[str, Artifact], dict[str, Any], Artifact | None]:
    """Return the base as an input, or its identity as parameters, and the preferences behind it if it has any."""
    path = Path(model_source(config.base))
    if not looks_local(config.base) or not is_finished(path):
        return {}, {"base_model": model_identity(config.base, config.revision)}, None
    base = open_artifact(path)
    base.verify()
    if base.manifest.dataset != REWARD_MODEL:
        return {"base": base}, {}, None
    if not is_finished(path.parent / USED):
        raise ConfigError(
            f"{config.base} is a reward model, and its {USED} do not lie beside it: copy both together, since older "
            "preferences are replayed from there"
        )
    history = open_artifact(path.parent / USED)
    return {"base": base, "older": history}, {}, history


def _read(config: RewardModelConfig, files: Sequence[str], source: str) -> Preferences:
    return read_preferences(
        files, config.runs, source=source, default_margin=config.margin, held_out_share=config.held_out_share
    )


def compute(task: StageTask[RewardModelConfig, Material]) -> None:
    """Train, score every pair with the result, and write model, tokenizer, report and rows."""
    from grpo.optimizer import deterministic
    from grpo.policy import save_policy
    from stages.reward_model.preference_loss import score_pairs, train_on_preferences

    config, material = task.config, task.resources
    deterministic(config.num_threads)
    model, tokenizer = _load(config, material)
    limits = [config.max_tokens or 0, context_length(model.config.to_dict()), int(tokenizer.model_max_length)]
    rows, pairs = encode_pairs(material.rows, tokenizer, min([limit for limit in limits if limit > 0], default=0))
    trained = [row["preference_id"] for row in rows if row["drop_reason"] is None]
    if not trained:
        reasons = pl.Series([row["drop_reason"] for row in rows]).unique(maintain_order=True).to_list()
        raise SourceError(
            f"none of {len(rows)} preferences is left to train on (drop reasons: {reasons}): give more of them, lower "
            "held_out_share, or raise max_tokens"
        )
    batches = [[pairs[i] for i in ids] for ids in order_batches(trained, config.epochs, config.batch_size, config.seed)]

    def told(step: int, facts: "PreferenceStep") -> None:
        task.progress(step, len(batches), f"loss {facts.loss:.3f}, accuracy {facts.accuracy:.3f}")

    try:
        steps = train_on_preferences(
            model,
            batches,
            config.adamw(len(trained)),
            centering=config.centering,
            pairs_per_forward=config.pairs_per_forward,
            on_step=told,
        )
    except ArithmeticError as error:
        raise GrpoError(str(error)) from error
    scores = dict(zip(pairs, score_pairs(model, list(pairs.values()), config.pairs_per_forward), strict=True))
    unknown = (None, None)
    for row in rows:
        usable = row["drop_reason"] in (None, "held_out")
        row["chosen_score"], row["rejected_score"] = scores[row["preference_id"]] if usable else unknown
    frame = preference_frame(rows)
    target = task.writers[REWARD_MODEL].directory
    save_policy(model, target)
    _save_tokenizer(tokenizer, material.source, target)
    report = {**summary(frame), "undecided": material.undecided, "losses": [step.loss for step in steps]}
    (target / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    task.writers[USED].write_part(0, frame)
    accuracy = report["held_out"]["accuracy"]
    held_out = "no pair held out" if accuracy is None else f"held-out accuracy {accuracy:.3f}"
    task.progress(len(batches), len(batches), held_out)


def encode_pairs(
    rows: Sequence[dict[str, Any]], tokenizer: Any, max_tokens: int
) -> tuple[list[dict[str, Any]], dict[str, "Pair"]]:
    """Return the rows, too long ones marked as dropped, and a pair for each that trains or tests."""
    from stages.reward_model.preference_loss import Pair

    result, pairs = [], {}
    for row in rows:
        if row["drop_reason"] not in (None, "held_out"):
            result.append(row)
            continue
        users = [m["content"] for m in row["messages"] if m["role"] == "user"]
        prompt = users[-1] if users else ""
        chosen, rejected = (encode_answer(tokenizer, row["messages"], prompt, row[k]) for k in ("chosen", "rejected"))
        longest = max(len(chosen["input_ids"]), len(rejected["input_ids"]))
        if longest > max_tokens > 0:
            result.append({**row, "drop_reason": "too_long"})
        else:
            result.append(dict(row))
            pairs[row["preference_id"]] = Pair(row["preference_id"], chosen, rejected, row["margin"])
    return result, pairs


def order_batches(ids: Sequence[str], epochs: int, batch_size: int, seed: int) -> list[list[str]]:
    """Return the ids of each optimizer step; every epoch has an order of its own, by hash, and a shorter last batch."""
    orders = [sorted(ids, key=lambda key: identity(seed, epoch, key)) for epoch in range(epochs)]
    return [order[start : start + batch_size] for order in orders for start in range(0, len(order), batch_size)]


def summary(frame: pl.DataFrame) -> dict[str, Any]:
    """Return the number and the accuracy of trained and of held-out pairs, in total and by source."""
    is_trained, is_held_out = pl.col("drop_reason").is_null(), pl.col("drop_reason") == "held_out"
    is_older = pl.col("source") == "older"
    return {
        "trained": _accuracy(frame.filter(is_trained)),
        "replayed": _accuracy(frame.filter(is_trained, is_older)),
        "held_out": _accuracy(frame.filter(is_held_out)),
        "held_out_new": _accuracy(frame.filter(is_held_out, ~is_older)),
        "held_out_older": _accuracy(frame.filter(is_held_out, is_older)),
    }


def _accuracy(rows: pl.DataFrame) -> dict[str, Any]:
    from stages.reward_model.preference_loss import preference_accuracy

    accuracy = preference_accuracy(rows["chosen_score"].to_list(), rows["rejected_score"].to_list())
    return {"pairs": len(rows), "accuracy": accuracy}


def _load(config: RewardModelConfig, material: Material) -> tuple["PreTrainedModel", Any]:
    """Return the model to train and its tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    from stages.rewards.models.classifier import REWARD_HEAD, choose_pad_token, load_classifier

    is_local, source = Path(material.source).is_dir(), material.source
    try:
        found: Any = AutoConfig.from_pretrained(
            source, revision=config.revision, local_files_only=is_local, trust_remote_code=False
        )
        names = found.architectures or []
        needs_head = is_causal(names)
        if not needs_head and not (any(name.endswith(REWARD_HEAD) for name in names) and found.num_labels == 1):
            raise PolicyError(
                f"reward_model.base is a {', '.join(names) or 'model of unknown architecture'} with {found.num_labels} "
                "labels: expected a causal language model, or a reward model with one logit; give one"
            )
        model = load_classifier(
            source,
            revision=config.revision,
            is_local=is_local,
            device=material.device,
            new_head_seed=config.seed if needs_head else None,
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(
            source, revision=config.revision, local_files_only=is_local, trust_remote_code=False
        )
        choose_pad_token(model, tokenizer)
    except GrpoError:
        raise
    except (ValueError, OSError) as error:
        raise PolicyError(str(error)) from error
    if needs_head and not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
    return model, tokenizer


def _save_tokenizer(tokenizer: Any, source: str, target: Path) -> None:
    """Write the tokenizer: a local one byte for byte, with the plain chat template where it has none."""
    if not Path(source).is_dir():
        tokenizer.save_pretrained(target)
        return
    copy_tokenizer(Path(source), target)
    if tokenizer.chat_template == PLAIN_TEMPLATE:
        (target / "chat_template.jinja").write_text(PLAIN_TEMPLATE, encoding="utf-8")


STAGE = Stage(REWARD_MODEL, version=2, config=RewardModelConfig, compute=compute)
