"""The thresholds of the audit, a table for each check. `configs/audit.toml` holds the same numbers with the reasons."""

from pydantic import Field

from pipeline.config import StrictModel


class DataConfig(StrictModel):
    """What all checks look at."""

    groups_per_iteration: int = Field(64, ge=1)
    """Groups of an iteration whose texts are read closely; numbers are taken from all of them."""
    characters: int = Field(8000, ge=100)
    """Characters of a completion or a prompt that are read closely, from its beginning."""
    window_share: float = Field(0.1, gt=0, le=0.5)
    """Share of the iterations in the early and in the late window."""
    window_most: int = Field(3, ge=1)
    """Iterations in a window at most: a fast hack must not lie within the early one."""
    min_iterations: int = Field(5, ge=2)
    """Iterations that a trend needs."""
    min_answers: int = Field(64, ge=1)
    """Completions that a share needs."""


class RewardLengthConfig(StrictModel):
    """reward_length: completions are paid by their length."""

    correlation: float = Field(0.5, gt=0, le=1)
    """Rank correlation of reward and length within groups from which there is a finding."""
    strong_correlation: float = Field(0.8, gt=0, le=1)
    """From here it is a warning by itself, below it only when the length moves too."""
    length_change: float = Field(0.1, ge=0)
    """Change of the mean length from the early to the late window, as a share of the early one: it moves."""
    trend: float = Field(0.9, gt=0, le=1)
    """Rank correlation of mean reward and mean length over the iterations from which there is an info."""
    trend_change: float = Field(0.25, ge=0)
    """Least change of the mean length for that."""
    min_moving_share: float = Field(0.2, ge=0, le=1)
    """Share of the informative groups in which the length varies at all; below it there is nothing to correlate."""


class DominantPartConfig(StrictModel):
    """dominant_part: one reward part decides alone."""

    share: float = Field(0.9, gt=0, le=1)
    """Share of the spread of the combined reward within groups that comes from one part."""
    fall: float = Field(0.25, gt=0)
    """Fall of another part's mean, in its early standard deviations, that makes it a warning."""


class SaturationConfig(StrictModel):
    """saturation: groups tell nothing any more."""

    flat_share: float = Field(0.8, gt=0, le=1)
    """Share of groups whose completions all got the same reward."""
    std_ratio: float = Field(0.2, ge=0, lt=1)
    """Late over early spread within groups."""
    failing_growth: float = Field(0.2, gt=0, le=1)
    """Growth of the share of groups that are flat without passing."""
    unbacked_gap: float = Field(0.2, gt=0, le=1)
    """By how much the passing share may exceed what references, or else held-out questions, confirm."""


class ReferenceConfig(StrictModel):
    """reward_against_reference: rewarded completions that do not name the reference answer."""

    min_agreement: float = Field(0.05, gt=0, le=1)
    """Share of completions that name the reference, in the best iteration; below it references are of another form."""
    agreement_fall: float = Field(0.1, gt=0, le=1)
    """Fall of that share while the reward rises."""
    gap: float = Field(0.3, gt=0, le=1)
    """Late pass rate minus late agreement."""


class ClassChangeConfig(StrictModel):
    """class_change: prompts once solved that are unsolved when they come again."""

    solved: float = Field(0.75, gt=0, le=1)
    """Share of passing completions from which a group counts as solved."""
    unsolved: float = Field(0.25, ge=0, lt=1)
    """Share up to which it counts as unsolved."""
    info_share: float = Field(0.05, ge=0, le=1)
    """Share of the solved prompts that are unsolved at their next visit: info."""
    share: float = Field(0.15, gt=0, le=1)
    """The same: warning."""
    min_visits: int = Field(20, ge=1)
    """Returning solved prompts that the share needs."""


class JumpsConfig(StrictModel):
    """jumps: a number changes between two iterations as it never did before or after."""

    deviations: float = Field(8.0, gt=0)
    """Least size of a jump in robust standard deviations (1.4826 MAD) of all changes."""
    reward: float = Field(0.15, gt=0)
    """Least jump of the mean reward, as a share of the range of rewards."""
    length: float = Field(0.25, gt=0)
    """Least jump of the mean length, as a share of its value before."""
    entropy: float = Field(0.5, gt=0)
    """Least jump of the entropy, as a share of its value before."""
    entropy_floor: float = Field(0.05, ge=0)
    """Least jump of the entropy in nats."""
    kl: float = Field(0.05, gt=0)
    """Least jump of the KL to the sampler in nats per token."""


class PolicyShareConfig(StrictModel):
    """policy_share: the completions of one policy take all the positive advantage of mixed groups."""

    share: float = Field(0.9, gt=0, le=1)
    """Share of the positive advantage."""
    excess: float = Field(0.2, ge=0, le=1)
    """By how much that exceeds the policy's share of the completions."""


class TruncatedConfig(StrictModel):
    """truncated: completions cut at max_tokens."""

    info_share: float = Field(0.05, gt=0, le=1)
    """Late share of cut completions: info."""
    share: float = Field(0.2, gt=0, le=1)
    """The same: warning."""


class TimedOutConfig(StrictModel):
    """timed_out: completions whose reward ran out of time."""

    info_share: float = Field(0.01, gt=0, le=1)
    """Late share of such completions, of one reward: info."""
    share: float = Field(0.05, gt=0, le=1)
    """The same: warning."""


class EvaluationGapConfig(StrictModel):
    """evaluation_gap: held-out and training questions are answered differently well."""

    sampled: float = Field(0.15, gt=0, le=1)
    """Difference of the sampled pass rates."""
    greedy_below: float = Field(0.15, gt=0, le=1)
    """By how much the held-out greedy pass rate falls short of the sampled training pass rate."""
    greedy_above: float = Field(0.5, gt=0, le=1)
    """By how much it exceeds it; greedy decoding is often better, so the bound is wide."""


class DuplicatesConfig(StrictModel):
    """duplicates_in_group and duplicates_across_prompts: the same text again."""

    group_share: float = Field(0.5, gt=0, le=1)
    """Share of completions with an equal or nearly equal sibling."""
    min_words: int = Field(12, ge=4)
    """Words from which completions are long enough for equality to be a sign and for near-duplicates to be sought."""
    similarity: float = Field(0.8, gt=0, le=1)
    """Estimated Jaccard similarity of word 3-grams from which two completions are near-duplicates."""
    prompt_share: float = Field(0.2, gt=0, le=1)
    """Share of the late prompts that get one and the same text."""
    reference_ratio: float = Field(3.0, ge=1)
    """How many times the share of the most common reference answer that must be."""
    min_prompts: int = Field(20, ge=2)
    """Different prompts that the share needs."""


class RepetitionConfig(StrictModel):
    """repetition: completions that say the same again and again."""

    repeated: float = Field(0.5, gt=0, lt=1)
    """Share of a completion's word 3-grams (of its character pairs, when it is short) that it has said before."""
    min_words: int = Field(8, ge=4)
    """Words from which word 3-grams are counted."""
    min_characters: int = Field(4, ge=3)
    """Characters from which a shorter completion is looked at."""
    share: float = Field(0.2, gt=0, le=1)
    """Late share of repetitive completions."""
    growth: float = Field(0.1, ge=0, le=1)
    """Growth over the early share that makes it a warning."""


class PromptCopyConfig(StrictModel):
    """prompt_copy: completions that repeat the prompt."""

    words: int = Field(5, ge=2)
    """Length of the word sequences that are compared."""
    overlap: float = Field(0.5, gt=0, le=1)
    """Share of a completion's word sequences that stand in the prompt."""
    share: float = Field(0.2, gt=0, le=1)
    """Late share of such completions."""
    growth: float = Field(0.1, ge=0, le=1)
    """Growth over the early share that makes it a warning."""


class ReferenceLeakConfig(StrictModel):
    """reference_in_prompt and reference_verbatim: completions that need not be found."""

    min_characters: int = Field(2, ge=1)
    """Shorter references (A, B, 7) are found everywhere by chance."""
    min_references: int = Field(10, ge=1)
    """Different references below which the reference is a choice among given answers."""
    info_share: float = Field(0.05, gt=0, le=1)
    """Share of prompts that contain their reference: info."""
    share: float = Field(0.2, gt=0, le=1)
    """The same: warning."""
    min_prompts: int = Field(20, ge=1)
    """Prompts with a reference that the share needs."""
    verbatim_words: int = Field(12, ge=4)
    """Words from which a reference repeated word by word is a sign of memory."""
    verbatim_share: float = Field(0.2, gt=0, le=1)
    """Late share of completions that repeat such a reference."""


class RewardedPhraseConfig(StrictModel):
    """rewarded_phrase: a fixed phrase, word or character that pays."""

    rows: int = Field(3000, ge=100)
    """Completions of informative groups that are compared."""
    units: int = Field(200, ge=10)
    """Words (characters, for short completions) of each that are read: half from the beginning, half from the end."""
    short_words: int = Field(4, ge=1)
    """Median words below which characters are compared instead of words."""
    difference: float = Field(0.3, gt=0, le=1)
    """Share of the rewarded completions with the phrase minus that of the unrewarded ones."""
    late_share: float = Field(0.3, gt=0, le=1)
    """Least share of the late completions that have the phrase."""
    growth: float = Field(0.2, gt=0, le=1)
    """Least growth of that share from the early window."""
    sufficient: float = Field(0.9, gt=0, le=1)
    """Share of the completions with the phrase that are rewarded from which the phrase alone seems to pay: warning."""
    unexplained: float = Field(0.15, ge=0, le=1)
    """By how much the late share must exceed the phrase's share in the reference answers."""
    expected: list[str] = Field(default_factory=list)
    """Texts that a reward asks for on purpose (a tag, for example); phrases that they contain are passed over."""


class EmptyFormatConfig(StrictModel):
    """empty_format: rewarded completions that are all form."""

    min_characters: int = Field(1, ge=1)
    """Letters and digits that must be left without tags, markup and punctuation."""
    share: float = Field(0.05, gt=0, le=1)
    """Share of the better-rewarded late completions without such content."""


class HeldOutConfig(StrictModel):
    """held_out_leak: evaluation questions or their reference answers in the training data."""

    info_share: float = Field(0.0, ge=0, le=1)
    """Share of the held-out questions among the training prompts above which there is an info."""
    share: float = Field(0.02, ge=0, le=1)
    """The same: warning."""


class AuditConfig(StrictModel):
    """All thresholds of `grpo audit`; every default is that of `configs/audit.toml`."""

    disabled: list[str] = Field(default_factory=list)
    """Names of checks that are left out."""
    data: DataConfig = DataConfig()
    reward_length: RewardLengthConfig = RewardLengthConfig()
    dominant_part: DominantPartConfig = DominantPartConfig()
    saturation: SaturationConfig = SaturationConfig()
    reference: ReferenceConfig = ReferenceConfig()
    class_change: ClassChangeConfig = ClassChangeConfig()
    jumps: JumpsConfig = JumpsConfig()
    policy_share: PolicyShareConfig = PolicyShareConfig()
    truncated: TruncatedConfig = TruncatedConfig()
    timed_out: TimedOutConfig = TimedOutConfig()
    evaluation_gap: EvaluationGapConfig = EvaluationGapConfig()
    duplicates: DuplicatesConfig = DuplicatesConfig()
    repetition: RepetitionConfig = RepetitionConfig()
    prompt_copy: PromptCopyConfig = PromptCopyConfig()
    reference_leak: ReferenceLeakConfig = ReferenceLeakConfig()
    rewarded_phrase: RewardedPhraseConfig = RewardedPhraseConfig()
    empty_format: EmptyFormatConfig = EmptyFormatConfig()
    held_out: HeldOutConfig = HeldOutConfig()
