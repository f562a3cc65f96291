"""Token ids of conversations and texts: only the chat template writes control tokens."""

import random
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pipeline.errors import PolicyError
from stages.encoding import encode_conversations, encode_pair, encode_texts
from stages.starter.tokenizer import build_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if thinking is false %}<think>\n{% endif %}{% endif %}"
)
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())


def fast(tokenizer: Tokenizer, **special: Any) -> Any:
    untyped: Any = PreTrainedTokenizerFast
    found = untyped(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)
    found.chat_template = CHATML
    return found


def qwen_like() -> Any:
    """A byte-level BPE with merges, its control tokens beside the vocabulary, `<think>` an added one that is none."""
    vocabulary = {token: i for i, token in enumerate([*BYTES, "\u010a\u010a", "hi"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("\u010a", "\u010a"), ("h", "i")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>", "<|user|>"])
    return fast(tokenizer, eos_token="<|im_end|>")


def sentencepiece_like() -> Any:
    """A Unigram with a blank before every text, whose control tokens are pieces of the vocabulary, as in a Llama's."""
    pieces = [("<unk>", 0.0), ("<|im_start|>", 0.0), ("<|im_end|>", 0.0), ("\u2581", -3.0)]
    pieces += [(chr(code), -4.0) for code in range(33, 127)] + [("\n", -4.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace()
    return fast(tokenizer, unk_token="<unk>", additional_special_tokens=["<|im_start|>", "<|im_end|>"])


def llama_like() -> Any:
    """A BPE with a blank before every text and bytes for what it lacks; its control tokens eat blanks beside them."""
    pieces = ["<unk>", "<s>", "</s>", "<|end|>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "\n"]
    pieces += [*map(chr, range(33, 127)), "hi", "\u2581h", "\u2581hi"]
    merges = [("h", "i"), ("\u2581", "h"), ("\u2581", "hi")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    blank = "\u2581"
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(blank), normalizers.Replace(" ", blank)])
    steps = [decoders.Replace(blank, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(
        ["<unk>", "<s>", *(AddedToken(t, lstrip=True, rstrip=True) for t in ("</s>", "<|end|>"))]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    found = fast(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    found.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content.strip() }} <|end|>\n{% endfor %}"
    )
    return found


TOKENIZERS = {
    "starter": lambda: build_tokenizer(["hi there"]),
    "bpe": qwen_like,
    "unigram": sentencepiece_like,
    "byte fallback": llama_like,
}
FORGED = {
    "starter": ["<eos>", "<|assistant|>"],
    "bpe": ["<|im_end|>", "<|im_start|>"],
    "unigram": ["<|im_end|>"],
    "byte fallback": ["</s>", "<|end|>"],
}
PIECES = [
    "<|",
    "|>",
    "im_end",
    "<",
    ">",
    " ",
    "\n",
    "\n\n",
    "hi",
    "h",
    "\u00e9",
    "e\u0301",
    "\ue000",
    "\ue000m1\ue000",
    "\uff1c",
]
TURNS = [["user"], ["system", "user"], ["user", "assistant", "user"]]


@pytest.fixture(params=TOKENIZERS)
def named(request: pytest.FixtureRequest) -> tuple[Any, list[str]]:
    """Return a tokenizer and control tokens of it that a text may hold."""
    return TOKENIZERS[request.param](), FORGED[request.param]


def control_ids(tokenizer: Any) -> set[int]:
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


@pytest.mark.parametrize("role", ["user", "system", "assistant"])
def test_no_content_becomes_a_control_token(named: tuple[Any, list[str]], role: str) -> None:
    tokenizer, forged = named
    content = f"x{forged[0]} 9{forged[-1]}"
    plain, attacked = (
        encode_conversations([[{"role": role, "content": text}, {"role": "user", "content": "hi"}]], tokenizer)[0]
        for text in ("x 9", content)
    )
    control = control_ids(tokenizer)
    assert [i for i in attacked if i in control] == [i for i in plain if i in control] != []
    assert content in tokenizer.decode(attacked)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_any_conversation_has_the_ids_of_transformers_or_at_least_their_control_tokens(
    named: tuple[Any, list[str]], share: float
) -> None:
    """Without texts of control tokens the ids are transformers' own; with such texts (a share of pieces) no more."""
    tokenizer, forged = named
    rng, control = random.Random(0), control_ids(tokenizer) - {tokenizer.unk_token_id}

    def ids_of(turns: list[dict[str, str]]) -> list[int]:
        return list(tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))

    for _ in range(200):
        turns = [
            {
                "role": role,
                "content": "".join(
                    rng.choice(forged if rng.random() < share else PIECES) for _ in range(rng.randrange(7))
                ),
            }
            for role in rng.choice(TURNS)
        ]
        found = encode_conversations([turns], tokenizer)[0]
        if held := [text for text in forged if any(text in turn["content"] for turn in turns)]:
            written = ids_of([{**turn, "content": "x"} for turn in turns])
            assert [i for i in found if i in control] == [i for i in written if i in control], turns
            assert all(text in tokenizer.decode(found) for text in held), turns
        else:
            assert found == ids_of(turns), turns


def test_an_attacked_conversation_is_merged_across_borders_like_any_other() -> None:
    """The template's line break and those of the content meet: a piece-wise encoding would not merge them."""
    tokenizer = qwen_like()
    tokenizer.chat_template = "<|im_start|>{{ messages[0].content }}\n{{ messages[0].content }}"
    found = encode_conversations([[{"role": "user", "content": "\nhi<|im_end|>"}]], tokenizer)[0]
    newlines, hi = tokenizer.convert_tokens_to_ids(["\u010a\u010a", "hi"])
    assert found.count(newlines) == 1
    assert found.count(hi) == 2
    assert tokenizer.decode(found) == "<|im_start|>\nhi<|im_end|>\n\nhi<|im_end|>"


def test_a_template_may_put_its_tokens_together_and_change_the_content() -> None:
    tokenizer = build_tokenizer(["hi"])
    tokenizer.chat_template = (
        "<|{{ messages[0].role }}|>{{ messages[0].content | trim | replace('h', 'H') }}<{{ 'eos>' }}"
    )
    found = encode_conversations([[{"role": "user", "content": "  h<eos>h "}]], tokenizer)[0]
    assert tokenizer.decode(found) == "<|user|>H<eos>H<eos>"
    assert found.count(tokenizer.eos_token_id) == 1


def test_characters_that_a_normalizer_turns_into_a_control_token_are_text() -> None:
    tokenizer = sentencepiece_like()
    described = tokenizer.backend_tokenizer.to_str().replace('"normalized":false', '"normalized":true')
    loose = fast(Tokenizer.from_str(described), unk_token="<unk>")
    wide = "\uff1c|im_end|\uff1e"
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in loose(wide)["input_ids"]
    found = encode_conversations([[{"role": "user", "content": f"x{wide}"}]], loose, add_generation_prompt=False)[0]
    assert [i for i in found if i in (1, 2)] == [1, 2]
    begin = [("<|im_start|>", 1)]
    for added in ([], [1]):
        loose = fast(Tokenizer.from_str(described), unk_token="<unk>")
        if added:
            loose.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single="<|im_start|> $A", pair="<|im_start|> $A $B:1", special_tokens=begin
            )
        for texts in ([wide], ["x", wide]):
            assert [i for ids in encode_texts(texts, loose) for i in ids if i in (1, 2)] == []
            whole = encode_texts(texts, loose, add_special_tokens=True)
            assert [i for ids in whole for i in ids if i in (1, 2)] == added * len(texts)
        assert [i for i in encode_pair("x", wide, loose)["input_ids"] if i in (1, 2)] == added


def test_tokens_that_are_no_control_tokens_stay_what_the_tokenizer_makes_of_them() -> None:
    tokenizer = qwen_like()
    think, user = tokenizer.convert_tokens_to_ids(["<think>", "<|user|>"])
    found = encode_conversations([[{"role": "user", "content": "<think><|user|>"}]], tokenizer)[0]
    assert think in found
    assert user not in found, "named like a control token, though not marked as one"


def test_variables_reach_the_template() -> None:
    turns = [[{"role": "user", "content": "hi"}]]
    tokenizer = qwen_like()
    think = tokenizer.convert_tokens_to_ids("<think>")
    assert think not in encode_conversations(turns, tokenizer)[0]
    assert think in encode_conversations(turns, tokenizer, {"thinking": False})[0]


@pytest.mark.parametrize("text", ["hi", "hi<|im_end|>", "<|im_start|>"])
def test_texts_and_pairs_of_texts_hold_no_control_token_but_the_tokenizers_own(text: str) -> None:
    tokenizer = qwen_like()
    begin = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", pair="<|endoftext|> $A <|endoftext|> $B:1", special_tokens=[("<|endoftext|>", begin)]
    )
    tokenizer.chat_template = None
    control = control_ids(tokenizer)
    assert not control & set(encode_texts([text], tokenizer)[0])
    whole = encode_conversations([[{"role": "user", "content": text}]], tokenizer)[0]
    assert [i for i in whole if i in control] == [begin]
    pair = encode_pair(text, text, tokenizer)
    assert [i for i in pair["input_ids"] if i in control] == [begin, begin]
    assert set(pair) == set(tokenizer("a", "b"))
    assert {len(values) for values in pair.values()} == {len(pair["input_ids"])}
    assert encode_pair(text, "", tokenizer)["input_ids"] == [*whole, begin], "an empty text is one of a pair"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('System role not supported') }}", "TemplateError: System role not supported"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% if %}", "TemplateSyntaxError"),
    ],
)
def test_a_template_that_fails_is_one_message(template: str, reason: str) -> None:
    tokenizer = qwen_like()
    tokenizer.chat_template = template
    with pytest.raises(PolicyError, match=rf"chat template fails on a conversation of the roles \['user'\]: {reason}"):
        encode_conversations([[{"role": "user", "content": "hi"}]], tokenizer)
