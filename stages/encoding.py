"""Conversations and texts -> token ids, so that no text becomes a control token.

A tokenizer reads `<|im_end|>` as one token wherever it stands. So a question, or an answer that a reward model judges,
could end its own turn and begin another. Here only the chat template writes control tokens: such a text inside of a
conversation gets the ids of its characters. Every other text gets exactly the tokenizer's own ids.

The way there, for a conversation that holds such texts: they are replaced by marks, the template writes the
conversation, each control token in what it wrote is renamed, the marks become the texts again, and a copy of the
tokenizer that knows the control tokens by their new names encodes the whole. Encoding piece by piece would lose what
goes across the borders: merges, and the blank that SentencePiece puts before a text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.errors import PolicyError
from stages.checkpoints import first_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]

NAMED_LIKE_CONTROL = re.compile(r"<[|\uff5c].*[|\uff5c]>")
"""Some tokenizers (DeepSeek) do not mark the tokens of their turns as special."""
PRIVATE_USE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))
"""Characters that mean nothing by themselves: one that the conversation does not hold makes marks and new names."""
COPIES_KEPT = 4
"""Copies of tokenizers; one of 150,000 tokens takes 30 MB."""


def encode_conversations(
    conversations: Sequence[Sequence[Message]],
    tokenizer: "PreTrainedTokenizerBase",
    variables: Mapping[str, Any] | None = None,
    *,
    add_generation_prompt: bool = True,
) -> list[list[int]]:
    """Return the ids of each conversation: by the chat template if the tokenizer has one, else of its texts.

    ``variables`` are given to the template.

    Raises:
        PolicyError: when the template cannot write a conversation.
    """
    if not conversations:
        return []
    if not tokenizer.chat_template:
        texts = ["\n".join(message["content"] for message in messages) for messages in conversations]
        return encode_texts(texts, tokenizer, add_special_tokens=True)
    control = _control_tokens(tokenizer)
    pattern = _any_of(control)
    marked = [_mark(messages, pattern, control) for messages in conversations]
    rendered = [render(messages, tokenizer, variables, add_generation_prompt) for messages, _ in marked]
    found = [list(ids) for ids in tokenizer(rendered, add_special_tokens=False)["input_ids"]]
    for index, (text, (_, mark)) in enumerate(zip(rendered, marked, strict=True)):
        if mark is not None or _holds_more(found[index], text, pattern, control, tokenizer):
            mark = mark or _unused(text)
            renamed = _rename(text, mark, pattern, control)
            found[index] = _renaming_copy(tokenizer, mark).encode(renamed, add_special_tokens=False).ids
    return found


def encode_texts(
    texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase", *, add_special_tokens: bool = False
) -> list[list[int]]:
    """Return the ids of each text; with ``add_special_tokens`` those that the tokenizer puts around one."""
    if not texts:
        return []
    control = _control_tokens(tokenizer)
    pattern = _any_of(control)
    nothing, *found = (
        list(ids) for ids in tokenizer(["", *texts], add_special_tokens=add_special_tokens, verbose=False).input_ids
    )
    for index, text in enumerate(texts):
        if pattern.search(text) or _holds_more(found[index], "", pattern, control, tokenizer, nothing):
            copy = _renaming_copy(tokenizer, _unused(text))
            found[index] = copy.encode(text, add_special_tokens=add_special_tokens).ids
    return found


def encode_pair(first: str, second: str, tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[int]]:
    """Return the model's inputs for a pair of texts, as the tokenizer joins them; nothing is cut."""
    control = _control_tokens(tokenizer)
    pattern = _any_of(control)
    # alone, an empty text makes no pair
    encoded = tokenizer([(first, second), ("", "")], truncation=False, verbose=False)
    ids, nothing = encoded["input_ids"]
    if not pattern.search(first + "\n" + second) and not _holds_more(ids, "", pattern, control, tokenizer, nothing):
        return {name: values[0] for name, values in encoded.items()}
    encoding = _renaming_copy(tokenizer, _unused(first + second)).encode(first, second)
    inputs = {
        "input_ids": encoding.ids,
        "token_type_ids": encoding.type_ids,
        "attention_mask": encoding.attention_mask,
    }
    return {name: ids for name, ids in inputs.items() if name in tokenizer.model_input_names}


def render(
    messages: Sequence[Message],
    tokenizer: "PreTrainedTokenizerBase",
    variables: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """Return a conversation as the chat template writes it.

    Raises:
        PolicyError: when the template refuses the conversation, or fails.
    """
    try:
        text: Any = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **(variables or {}),
        )
    except Exception as error:  # a template is a program: it raises what it likes, MemoryError included
        raise PolicyError(
            f"the model's chat template fails on a conversation of the roles {[m['role'] for m in messages]}: "
            f"{type(error).__name__}: {first_line(error)}; expected a text; change prompts.system_prompt, "
            "prompts.chat_template_kwargs or the row, or take a model whose template allows it"
        ) from error
    return str(text)


def _control_tokens(tokenizer: "PreTrainedTokenizerBase") -> dict[str, int]:
    """Return the ids of the tokens that no text may become, by their texts."""
    added: Any = tokenizer.added_tokens_decoder
    return {
        token.content: token_id
        for token_id, token in added.items()
        if token.content and (token.special or NAMED_LIKE_CONTROL.fullmatch(token.content))
    }


def _any_of(texts: Mapping[str, int]) -> re.Pattern[str]:
    """Return the pattern that finds the texts as a tokenizer does: of several at one place the longest."""
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _mark(
    messages: Sequence[Message], pattern: re.Pattern[str], control: Mapping[str, int]
) -> tuple[Sequence[Message], str | None]:
    """Return the conversation with marks in place of texts of control tokens, and what marks begin with, if any."""
    if not any(pattern.search(message["content"]) for message in messages):
        return messages, None
    mark = _unused("".join(message["content"] for message in messages))
    marked = [
        {**message, "content": pattern.sub(lambda found: f"{mark}m{control[found[0]]}{mark}", message["content"])}
        for message in messages
    ]
    return marked, mark


def _rename(text: str, mark: str, pattern: re.Pattern[str], control: Mapping[str, int]) -> str:
    """Return the written conversation with new names for control tokens, and the marks' own texts for marks."""
    renamed = pattern.sub(lambda found: _new_name(mark, control[found[0]]), text)
    by_id = {token_id: content for content, token_id in control.items()}
    return re.sub(f"{mark}m(\\d+){mark}", lambda found: by_id[int(found[1])], renamed)


def _new_name(mark: str, token_id: int) -> str:
    return f"{mark}c{token_id}{mark}"


def _unused(text: str) -> str:
    """Return a character that the text does not hold."""
    held = set(text)
    free = next((chr(code) for code in PRIVATE_USE if chr(code) not in held), None)
    if free is None:
        raise PolicyError("a text holds every character of Unicode's private use: expected a text; remove the row")
    return free


def _holds_more(
    ids: Sequence[int],
    text: str,
    pattern: re.Pattern[str],
    control: Mapping[str, int],
    tokenizer: "PreTrainedTokenizerBase",
    added: Sequence[int] = (),
) -> bool:
    """Return whether there are more control tokens than texts of them, and than the tokenizer has ``added``.

    Then a normalizer has made some of other text.
    """
    unknown: int | None = tokenizer.unk_token_id  # stands for any character that the tokenizer lacks
    known = set(control.values()) - {unknown}
    expected = sum(control[found] != unknown for found in pattern.findall(text)) + sum(i in known for i in added)
    return sum(i in known for i in ids) > expected


_copies: "dict[tuple[int, str], tuple[PreTrainedTokenizerBase, Tokenizer]]" = {}
"""By the tokenizer's id, which stays its own while it is kept here."""


def _renaming_copy(tokenizer: "PreTrainedTokenizerBase", mark: str) -> "Tokenizer":
    """Return a copy of the tokenizer that knows control tokens by their new names only.

    Raises:
        PolicyError: when the tokenizer is none of the package tokenizers.
    """
    key = (id(tokenizer), mark)
    if key not in _copies:
        if len(_copies) >= COPIES_KEPT:
            _copies.pop(next(iter(_copies)))
        _copies[key] = (tokenizer, _make_renaming_copy(tokenizer, mark))
    return _copies[key][1]


def _make_renaming_copy(tokenizer: "PreTrainedTokenizerBase", mark: str) -> "Tokenizer":
    from tokenizers import Tokenizer

    control = _control_tokens(tokenizer)
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise PolicyError(
            f"a text holds a control token of the model, such as {next(iter(control))}, and {type(tokenizer).__name__} "
            "cannot encode it as text: expected a tokenizer with tokenizer.json; remove the text, or convert the "
            "tokenizer"
        )
    described = json.loads(backend.to_str())
    names = {content: _new_name(mark, token_id) for content, token_id in control.items()}
    for token in described["added_tokens"]:
        if token["content"] in names:
            token.update(content=names[token["content"]], normalized=False)
    model = described["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): index for piece, index in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    copy = Tokenizer.from_str(json.dumps(described))
    copy.no_padding()
    copy.no_truncation()
    moved = [content for content, token_id in control.items() if copy.token_to_id(names[content]) != token_id]
    if moved:
        raise PolicyError(
            f"a text holds a control token of the model, and the tokenizer's files give {moved[0]!r} another id than "
            "the tokenizer: expected the same; save the tokenizer again, or remove the text"
        )
    return copy
