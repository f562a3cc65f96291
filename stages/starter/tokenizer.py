"""The starter's tokenizer: the words of the task's own texts, digits one by one, bytes for everything else.

A word (with the space before it) is one token when the texts contain it, so that questions stay short. A digit is
always a token of its own, so that the model can calculate with it. What the texts do not contain falls back to bytes,
so that no text is unknown and every text is decoded as it was encoded.
"""

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_WORDS = 4096
"""Bounds the embedding table where the texts hold many different words; the most frequent ones stay."""

PIECES = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]|\s"
"""Letters and single signs include the space before them; a digit never does, so each has one embedding."""

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(texts: Iterable[str]) -> "PreTrainedTokenizerFast":
    """Return the tokenizer of these texts; the same texts, in any order, give the same tokenizer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Split(Regex(PIECES), behavior="isolated")
    pieces = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    counts = Counter(piece for text in texts for piece, _ in pieces.pre_tokenize_str(text) if len(piece) > 1)
    words = sorted(counts, key=lambda word: (-counts[word], word))[:MAX_WORDS]
    tokens = [PAD, EOS, UNKNOWN, *ROLES, *sorted(pre_tokenizers.ByteLevel.alphabet()), *words]
    # Without merges, and with ignore_merges, a piece is one token if it is in the vocabulary, and bytes if it is not.
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=UNKNOWN, ignore_merges=True))
    tokenizer.pre_tokenizer = pieces
    tokenizer.decoder = decoders.ByteLevel()
    untyped: Any = PreTrainedTokenizerFast
    fast: PreTrainedTokenizerFast = untyped(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=list(ROLES),
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
