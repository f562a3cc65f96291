"""Tiny models for tests whose outputs are known by construction."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WORDS = ("<pad>", "<eos>", "<unk>", "<bos>", "red", "green", "blue", "sky", "is", "the", ".", "user", "assistant", ":")

NLI = {0: "contradiction", 1: "entailment", 2: "neutral"}


def save_word_tokenizer(path: Path, *, bos: bool = True, words: Sequence[str] = WORDS, chat: bool = False) -> None:
    """Save a tokenizer whose tokens are words and single signs; unknown ones become <unk>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A <eos> $B", special_tokens=[("<eos>", 1)]
    )
    untyped: Any = PreTrainedTokenizerFast
    fast = untyped(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        bos_token="<bos>" if bos else None,
        clean_up_tokenization_spaces=False,
    )
    if chat:
        fast.chat_template = (
            "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
            "{% if add_generation_prompt %}assistant :{% endif %}"
        )
    fast.save_pretrained(path)


def save_uniform_lm(path: Path, *, bos: bool = True, chat: bool = False, context: int = 32) -> None:
    """Save a random Llama with a zero head: each of its 14 tokens has probability 1/14 everywhere."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from grpo.policy import save_policy

    config = LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=context, **_shape())
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    model.lm_head.weight.data.zero_()
    path.mkdir(parents=True)
    save_policy(model, path)
    save_word_tokenizer(path, bos=bos, chat=chat)


def save_constant_classifier(
    path: Path, logits: Sequence[float], labels: Mapping[int, str] | None = None, *, context: int = 64
) -> None:
    """Save a BERT classifier whose weights are 0 but for its last bias: it gives these logits to every input."""
    import torch
    from transformers import BertForSequenceClassification

    from grpo.policy import save_policy

    names = dict(labels or {i: f"LABEL_{i}" for i in range(len(logits))})
    indices = {name: i for i, name in names.items()}
    model: Any = BertForSequenceClassification(_bert_config(context, id2label=names, label2id=indices))
    for parameter in model.parameters():
        parameter.data.zero_()
    model.classifier.bias.data = torch.tensor(list(logits))
    path.mkdir(parents=True)
    save_policy(model, path)
    save_word_tokenizer(path)


def save_favourite_lm(path: Path, favourite: str) -> None:
    """Save a Llama that gives the favourite word probability 1/2 after every word, and 1/26 to each of the others."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from grpo.policy import save_policy

    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=32, **_shape()))
    _say_nothing_between(model)
    model.lm_head.weight.data.zero_()
    model.lm_head.weight.data[WORDS.index(favourite)] = math.log(13) / 4
    path.mkdir(parents=True)
    save_policy(model, path)
    save_word_tokenizer(path)


def save_last_word_reward_model(path: Path, *, chat: bool, scores: Mapping[str, float], pad: int | None = 0) -> None:
    """Save a Llama reward model whose logit depends on the last token alone, and is ``scores`` of it, else 0."""
    save_last_word_classifier(path, [scores], chat=chat, pad=pad)


def save_last_word_classifier(
    path: Path,
    scores: Sequence[Mapping[str, float]],
    labels: Mapping[int, str] | None = None,
    *,
    chat: bool = False,
    pad: int | None = 0,
    looks_around: bool = False,
) -> None:
    """Save a Llama classifier whose logit of each label depends on the last token alone: its score, else 0.

    With ``looks_around`` its attention adds the mean of all tokens, so that words further left count too, but less.
    """
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from grpo.policy import save_policy

    config = LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=32, num_labels=len(scores), **_shape())
    config.pad_token_id = pad
    if labels is not None:
        config.id2label = dict(labels)
    model: Any = LlamaForSequenceClassification(config)
    _say_nothing_between(model)
    if looks_around:
        attention = model.model.layers[0].self_attn
        attention.q_proj.weight.data.zero_()
        attention.v_proj.weight.data = torch.eye(16)
        attention.o_proj.weight.data = torch.eye(16)
    rows = [[label.get(word, 0.0) / 4 for word in WORDS] + [0.0, 0.0] for label in scores]
    model.score.weight.data = torch.tensor(rows)
    path.mkdir(parents=True)
    save_policy(model, path)
    save_word_tokenizer(path, chat=chat)


def save_word_encoder(path: Path, vectors: Mapping[str, Sequence[float]], *, longest: int = 8) -> None:
    """Save a sentence-transformers model: the mean of the vectors of the known words of a text."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, WordEmbeddings
    from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer

    tokenizer = WhitespaceTokenizer(list(vectors), stop_words=set(), do_lower_case=True)
    words = WordEmbeddings(tokenizer, torch.tensor([list(v) for v in vectors.values()]), max_seq_length=longest)
    size = len(next(iter(vectors.values())))
    SentenceTransformer(modules=[words, Pooling(size, pooling_mode="mean")], device="cpu").save(str(path))


def save_random_encoder(path: Path, *, context: int) -> None:
    """Save a random BERT with its tokenizer; sentence-transformers takes the mean of its tokens."""
    import torch
    from transformers import BertModel

    from grpo.policy import save_policy

    torch.manual_seed(0)
    path.mkdir(parents=True)
    save_policy(BertModel(_bert_config(context)), path)
    save_word_tokenizer(path)


def save_case_models(folder: Path) -> dict[str, str]:
    """Save the models that worked cases of rewards name; return their paths. `rewards_doc` says what each does."""
    halves = {0: "entailment", 1: "not_entailment"}
    save_word_encoder(folder / "word_encoder", {"red": [1, 0], "green": [0, 1], "blue": [3.0, 4.0], "minus": [-1, 0]})
    save_uniform_lm(folder / "uniform_lm", chat=True)
    save_favourite_lm(folder / "favourite_lm", "red")
    save_constant_classifier(folder / "constant_classifier", [0.0, math.log(2), 0.0], NLI)
    save_last_word_classifier(folder / "last_word_classifier", [{"red": math.log(3)}, {}], halves)
    save_last_word_reward_model(folder / "reward_model", chat=True, scores={"red": 1.5, "blue": -2.0})
    return {path.name: str(path) for path in folder.iterdir()}


def detail(frame: Any, row: int = 0) -> Any:
    """Return what a reward says it saw in a row."""
    return json.loads(frame["detail"][row])


def answer_rows(*rows: dict[str, Any]) -> Any:
    """Return completions as a frame-shaped reward sees them; each dict names what matters to the test."""
    import polars as pl

    filled = []
    for i, row in enumerate(rows):
        prompt = row.get("prompt", "the sky")
        defaults = {
            "completion": "blue",
            "prompt": prompt,
            "reference": None,
            "messages": [{"role": "user", "content": prompt}],
            "metadata": "{}",
            "completion_id": f"c{i}",
            "group_id": "g",
        }
        filled.append({**defaults, **row})
    return pl.DataFrame(filled, schema_overrides={"reference": pl.String}, strict=False)


def _say_nothing_between(model: Any) -> None:
    """Let the layers add nothing, and give each word a unit vector, which RMS normalisation scales by sqrt(16)."""
    import torch

    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()
    model.model.embed_tokens.weight.data = torch.eye(len(WORDS), 16)


def _bert_config(context: int, **more: Any) -> Any:
    from transformers import BertConfig

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return BertConfig(vocab_size=len(WORDS), max_position_embeddings=context, pad_token_id=0, **sizes, **more)


def _shape() -> dict[str, Any]:
    return {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
