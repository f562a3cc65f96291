"""Tiny policies for tests: random weights, and for one of them a tokenizer of single characters."""

from pathlib import Path
from typing import Any

EOS = 1


def save_random_qwen2(path: Path, *, seed: int, **config: Any) -> Path:
    """Save a random model of two layers without a tokenizer; return the path.

    With a large ``initializer_range`` its distributions are far from uniform.
    """
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(seed)
    sizes = Qwen2Config(num_hidden_layers=2, num_key_value_heads=2, eos_token_id=EOS, pad_token_id=0, **config)
    AutoModelForCausalLM.from_config(sizes).save_pretrained(path)  # type: ignore[no-untyped-call]
    return path


def save_tiny_policy(path: Path, *, seed: int = 0, context: int = 128, hidden_size: int = 32) -> None:
    """Save a random Qwen2 checkpoint with a tokenizer of printable characters."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    from grpo.policy import save_policy

    vocabulary = ["<pad>", "<eos>", "<unk>", *map(chr, range(32, 127)), "\n"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    config = Qwen2Config(
        vocab_size=len(vocabulary),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    path.mkdir(parents=True)
    save_policy(Qwen2ForCausalLM(config), path)
    fast.save_pretrained(path)
