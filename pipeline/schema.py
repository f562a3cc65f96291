"""The Arrow schema of every dataset, checked on every write and when a stage reads it.

`pipeline.columns` has the conventions, and the columns that several datasets have. `docs/datasets.md` is generated from
this module by `grpo schema --markdown`.
"""

import pyarrow as pa

from pipeline.columns import (
    COMPLETION,
    COMPLETION_ID,
    COMPLETION_TOKEN_IDS,
    DROP_REASON,
    FINISH_REASON,
    GROUP_ID,
    LOSS_MASK,
    MESSAGES,
    OPTIMIZER_STEP,
    POLICY_DIGEST,
    POLICY_ITERATION,
    PROMPT_ID,
    PROMPT_TOKEN_IDS,
    REFERENCE_ANSWER,
    SAMPLING_LOGPROBS,
    SEED,
    TEMPERATURE,
    TEXTS,
    TOKEN_COLUMNS,
    TOKEN_FLOATS,
    column,
    dataset,
)

SCHEMAS: dict[str, pa.Schema] = {
    "prompts": dataset(
        "The questions of one iteration, as messages and as the token ids that the engine receives.",
        [
            PROMPT_ID,
            column("messages", MESSAGES, "the conversation that is to be answered"),
            PROMPT_TOKEN_IDS,
            REFERENCE_ANSWER,
            column("task", pa.string(), "the source that the prompt comes from"),
            column("metadata", pa.string(), "JSON: the whole source row, answer included, for the reward functions"),
            DROP_REASON,
        ],
    ),
    "completions": dataset(
        "Groups of sampled answers: one row per answer, with the policy that wrote it.",
        [
            COMPLETION_ID,
            GROUP_ID,
            PROMPT_ID,
            column("completion_index", pa.int32(), "position of the answer in its group"),
            column("policy_name", pa.string(), "name of the group member that wrote it, as in generate.members"),
            POLICY_DIGEST,
            POLICY_ITERATION,
            PROMPT_TOKEN_IDS,
            COMPLETION_TOKEN_IDS,
            SAMPLING_LOGPROBS,
            LOSS_MASK,
            COMPLETION,
            FINISH_REASON,
            column("stop_reason", pa.string(), "the stop token or string that ended it, if one did", nullable=True),
            SEED,
            TEMPERATURE,
            column("top_p", pa.float32(), "nucleus sampling; 1 = off"),
            column("top_k", pa.int32(), "top-k sampling; 0 = off"),
            column("min_p", pa.float32(), "min-p sampling; 0 = off"),
            column(
                "logprobs_mode",
                pa.string(),
                "processed = after temperature and truncation; raw = before; as the engine says",
            ),
            column(
                "kept_mass",
                TOKEN_FLOATS,
                "probability that truncated sampling left at each token; null = sampling was not truncated",
                nullable=True,
            ),
            column("engine", pa.string(), "inference engine"),
            column("engine_version", pa.string(), "its version"),
        ],
    ),
    "rewards": dataset(
        "Long format: one row per completion and reward function.",
        [
            COMPLETION_ID,
            GROUP_ID,
            column("reward_name", pa.string(), "name of the reward function in the config"),
            column("reward_recipe", pa.string(), "identity of the function that gave it: source, arguments, version"),
            column("reward", pa.float64(), "the score; null = could not be scored", nullable=True),
            column("error", pa.string(), "why there is no score", nullable=True),
            column("detail", pa.string(), "JSON: what the function saw, e.g. the extracted answer", nullable=True),
        ],
    ),
    "advantages": dataset(
        "One row per completion: its combined reward, its group's statistics and its advantage.",
        [
            COMPLETION_ID,
            GROUP_ID,
            column("reward", pa.float64(), "weighted sum of the rewards; null = unscored", nullable=True),
            column("group_reward_mean", pa.float64(), "mean over scored members; null = none is scored", nullable=True),
            column(
                "group_reward_std",
                pa.float64(),
                "standard deviation over scored members (normalize.ddof); null = too few are scored",
                nullable=True,
            ),
            column("group_size", pa.int32(), "scored members of the group"),
            column("advantage", pa.float64(), "how much better than its group; 0 where the group tells nothing"),
            column(
                "drop_reason",
                pa.string(),
                "unscored, singleton (no other scored member), zero_variance (all members equal); null = informative",
                nullable=True,
            ),
        ],
    ),
    "checks": dataset(
        "What the checks of [[checks]] say of an iteration's rows before they train: one row per check.",
        [
            column("name", pa.string(), "name of the check in the config"),
            column("severity", pa.string(), "what follows when it fails: warn, block, quarantine; see docs/checks.md"),
            column("dataset", pa.string(), "the dataset whose rows it looked at"),
            column("condition", pa.string(), "SQL, true for rows that fail; or the name of a check and its options"),
            column(
                "max_share", pa.float64(), "share that may fail, of what: docs/checks.md; null = any", nullable=True
            ),
            column("num_rows", pa.int64(), "rows that it looked at"),
            column("num_failed", pa.int64(), "rows that failed; of a check of the audit, those that it shows"),
            column("failed_ids", TEXTS, "completion_id of every row that failed, once, in the order of the rows"),
            column("passed", pa.bool_(), "whether the check passed"),
            column("note", pa.string(), "the numbers that it saw"),
        ],
    ),
    "batches": dataset(
        "The training order as data: each kept row is trainable by itself, dropped rows stand beside with a reason.",
        [
            column("optimizer_step", pa.int32(), "index of the optimizer step; null = dropped", nullable=True),
            column(
                "microbatch", pa.int32(), "index of the forward pass within the step; null = dropped", nullable=True
            ),
            column("row", pa.int32(), "position within the microbatch; null = dropped", nullable=True),
            COMPLETION_ID,
            GROUP_ID,
            PROMPT_TOKEN_IDS,
            COMPLETION_TOKEN_IDS,
            LOSS_MASK,
            column(
                "sampling_logprobs",
                TOKEN_FLOATS,
                "as in completions, plus log(kept_mass) where sampling was truncated: over the full vocabulary",
            ),
            TEMPERATURE,
            column("advantage", pa.float64(), "as in advantages"),
            POLICY_DIGEST,
            column(
                "loss_denominator",
                pa.float64(),
                "what the summed token losses of the row are divided by; null = dropped",
                nullable=True,
            ),
            DROP_REASON,
        ],
    ),
    "logprobs": dataset(
        "Log probabilities of rows under policies that do not train: one row per policy and completion that may train.",
        [
            COMPLETION_ID,
            column(
                "policy_name",
                pa.string(),
                "proximal = the policy that the clip compares with; reference = that of [update.kl]; current = the one "
                "that trains",
            ),
            column("policy_digest", pa.string(), "digest of the policy artifact with those weights"),
            column(
                "logprobs",
                TOKEN_FLOATS,
                "natural log probability of each completion token at the sampling temperature, over the full "
                "vocabulary; null where the token does not train",
            ),
        ],
    ),
    "training_records": dataset(
        "What the update did with each row: one row per completion and optimizer step.",
        [
            COMPLETION_ID,
            OPTIMIZER_STEP,
            column("num_tokens", pa.int32(), "tokens that trained"),
            column(
                "importance_ratio_mean",
                pa.float64(),
                "mean over tokens of current / proximal probability",
                nullable=True,
            ),
            column("importance_ratio_max", pa.float64(), "largest current / proximal probability", nullable=True),
            column("clipped_low_tokens", pa.int32(), "tokens with A < 0 and a ratio under 1 - clip_low: no gradient"),
            column("clipped_high_tokens", pa.int32(), "tokens with A > 0 and a ratio over 1 + clip_high: no gradient"),
            column("bounded_tokens", pa.int32(), "tokens whose gradient another bound of the loss has changed"),
            column("correction_weight_mean", pa.float64(), "mean sampler correction weight", nullable=True),
            column("masked_tokens", pa.int32(), "tokens that the correction gave weight 0"),
            column("known_tokens", pa.int32(), "trained tokens whose sampling logprob is known"),
            column(
                "entropy_mean",
                pa.float64(),
                "mean entropy of the policy's next-token distribution, nats",
                nullable=True,
            ),
            column(
                "kl_to_sampler",
                pa.float64(),
                "mean over known_tokens of the k3 estimate of KL(sampler || current), nats",
                nullable=True,
            ),
            column(
                "kl_to_reference",
                pa.float64(),
                "mean over tokens of the k3 estimate of KL(current || reference), nats; null without [update.kl]",
                nullable=True,
            ),
            column(
                "logprob_difference_max",
                pa.float64(),
                "largest |proximal - sampler| log probability: engine mismatch and staleness",
                nullable=True,
            ),
            column("loss", pa.float64(), "this row's share of the step's loss"),
            column("trainer_logprobs", TOKEN_FLOATS, "with update.record_tokens: the trainer's", nullable=True),
            column("sampling_logprobs", TOKEN_FLOATS, "with update.record_tokens: the sampler's", nullable=True),
            column("importance_ratios", TOKEN_FLOATS, "with update.record_tokens: per token", nullable=True),
            column("correction_weights", TOKEN_FLOATS, "with update.record_tokens: per token", nullable=True),
            column("entropies", TOKEN_FLOATS, "with update.record_tokens: per token", nullable=True),
            *TOKEN_COLUMNS,
        ],
    ),
    "optimizer_steps": dataset(
        "One row per optimizer step of an iteration.",
        [
            OPTIMIZER_STEP,
            column("learning_rate", pa.float64(), "used by this step"),
            column("grad_norm", pa.float64(), "norm of the gradient before it was clipped"),
            column("loss", pa.float64(), "its value says little: on-policy it is near 0 while the gradient is not"),
            column("num_tokens", pa.int64(), "tokens that trained"),
            column("num_rows", pa.int64(), "completions that trained"),
        ],
    ),
    "evaluations": dataset(
        "Held-out prompts answered by a policy: one row per answer.",
        [
            COMPLETION_ID,
            GROUP_ID,
            PROMPT_ID,
            column("decoding", pa.string(), "greedy (for pass@1) or sampled (for pass@k)"),
            column("completion_index", pa.int32(), "position among the answers of the same decoding"),
            POLICY_DIGEST,
            POLICY_ITERATION,
            column("messages", MESSAGES, "the conversation that is answered"),
            REFERENCE_ANSWER,
            COMPLETION,
            COMPLETION_TOKEN_IDS,
            SAMPLING_LOGPROBS,
            FINISH_REASON,
            SEED,
            TEMPERATURE,
            column("reward", pa.float64(), "combined reward; null = could not be scored", nullable=True),
            column(
                "is_correct", pa.bool_(), "reward is at least evaluate.pass_threshold; null = unscored", nullable=True
            ),
            column("error", pa.string(), "why there is no reward", nullable=True),
        ],
    ),
    "judgements": dataset(
        "What judges have answered, kept so that no question is paid for twice: one row per answer received. A cache, "
        "no artifact: its bytes hold a clock, its parts come in any order, no digest covers it.",
        [
            column("request_hash", pa.string(), "hash of all that decides the answer: model, messages and sampling"),
            column("model", pa.string(), "the model that was asked for"),
            column("messages", MESSAGES, "the conversation as sent"),
            column("sampling", pa.string(), "JSON: the rest of the request (temperature, max_tokens, seed, ...)"),
            column("answer", pa.string(), "the judge's words, unparsed"),
            column("finish_reason", pa.string(), "as the server says; null = it says none", nullable=True),
            column("served_model", pa.string(), "the model that answered, as the server names it", nullable=True),
            column("num_prompt_tokens", pa.int64(), "tokens read; null = the server does not say", nullable=True),
            column("num_completion_tokens", pa.int64(), "tokens written; null = as above", nullable=True),
            column("created", pa.string(), "when the answer came, UTC; of several to one request the first counts"),
        ],
    ),
    "preferences_used": dataset(
        "Beside a reward model: every preference that it was offered, and which of them trained it.",
        [
            column("preference_id", pa.string(), "hash of the conversation, both answers and the rater"),
            column("source", pa.string(), "new = from this round's files; older = from before, such as the base's own"),
            column("chosen_id", pa.string(), "completion_id of the better answer; null = given as text", nullable=True),
            column(
                "rejected_id", pa.string(), "completion_id of the worse answer; null = given as text", nullable=True
            ),
            column("messages", MESSAGES, "the conversation that both answer"),
            column("chosen", pa.string(), "the better answer"),
            column("rejected", pa.string(), "the worse answer"),
            column("margin", pa.float64(), "by how much the reward of the better one is to be higher"),
            column("rater", pa.string(), "who compared them; null = unknown", nullable=True),
            column(
                "drop_reason",
                pa.string(),
                "held_out (tested only), not_replayed (older, not drawn), duplicate, equal, tie, too_long; "
                "null = trained",
                nullable=True,
            ),
            column("chosen_score", pa.float64(), "reward by the finished model; null = not scored", nullable=True),
            column("rejected_score", pa.float64(), "reward by the finished model; null = not scored", nullable=True),
        ],
    ),
    "metrics": dataset(
        "One row per iteration, derived from its artifacts.",
        [
            column("iteration", pa.int32(), "index of the iteration"),
            column("reward_mean", pa.float64(), "mean combined reward of scored completions", nullable=True),
            column("reward_std", pa.float64(), "its standard deviation", nullable=True),
            column(
                "pass_rate",
                pa.float64(),
                "share of scored completions at or over evaluate.pass_threshold",
                nullable=True,
            ),
            column(
                "rewards",
                pa.list_(
                    pa.struct(
                        [
                            pa.field("name", pa.string()),
                            pa.field("mean", pa.float64()),
                            pa.field("null_count", pa.int64()),
                            pa.field("timed_out_count", pa.int64()),
                        ]
                    )
                ),
                "per reward function: mean, number of completions it could not score, and of those whose time ran out",
            ),
            column("completion_tokens_mean", pa.float64(), "mean length of the answers"),
            column("truncated_share", pa.float64(), "share of answers cut at max_tokens"),
            column("zero_variance_share", pa.float64(), "share of groups whose members all got the same reward"),
            column("num_completions", pa.int64(), "completions generated"),
            column("num_trained", pa.int64(), "completions that trained"),
            column("num_tokens", pa.int64(), "tokens that trained"),
            column("num_failed_checks", pa.int64(), "of [[checks]]; null = the iteration has none", nullable=True),
            column("num_quarantined", pa.int64(), "completions that checks kept from training", nullable=True),
            column(
                "entropy",
                pa.float64(),
                "of the distributions that completions were sampled from: mean of -log probability over all tokens, "
                "an estimate without a forward, nats",
                nullable=True,
            ),
            column(
                "entropy_trained",
                pa.float64(),
                "of the current policy at the tokens that trained: those of groups whose rewards differ, nats",
                nullable=True,
            ),
            column(
                "kl_to_sampler",
                pa.float64(),
                "mean over the trained tokens whose sampling logprob is known of the k3 estimate, nats",
                nullable=True,
            ),
            column(
                "kl_to_reference",
                pa.float64(),
                "mean over the trained tokens of the k3 estimate of KL(current || reference), nats; null without one",
                nullable=True,
            ),
            column("clip_low_share", pa.float64(), "share of tokens clipped with A < 0", nullable=True),
            column("clip_high_share", pa.float64(), "share of tokens clipped with A > 0", nullable=True),
            column(
                "bounded_share",
                pa.float64(),
                "share of tokens whose gradient another bound of the loss has changed",
                nullable=True,
            ),
            column("loss", pa.float64(), "mean over optimizer steps", nullable=True),
            column("grad_norm", pa.float64(), "before clipping, mean over optimizer steps", nullable=True),
            column("learning_rate", pa.float64(), "at the last optimizer step", nullable=True),
            column("eval_pass_at_1", pa.float64(), "held-out, greedy; null = not evaluated", nullable=True),
            column("eval_pass_rate", pa.float64(), "held-out, sampled: share of correct answers", nullable=True),
            column("eval_pass_at_k", pa.float64(), "held-out, sampled: at least one of k is correct", nullable=True),
            column(
                "generate_tokens_per_second",
                pa.float64(),
                "completion tokens over the seconds of generate; null = completions of another run, or no time at all",
                nullable=True,
            ),
            column(
                "seconds",
                pa.list_(pa.struct([pa.field("stage", pa.string()), pa.field("seconds", pa.float64())])),
                "wall time of each stage when it was computed",
            ),
        ],
    ),
}
