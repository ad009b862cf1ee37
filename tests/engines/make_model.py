"""Make a model for the engine tests: a tiny one with random weights and a tokenizer of its own; downloads nothing.

Run by the Python of the engine's environment:

    VENV/bin/python tests/engines/make_model.py FOLDER [SEED [LAYERS WIDTH]]
    VENV/bin/python tests/engines/make_model.py FOLDER hybrid | windowed

It is a Llama. The other two are a Gemma 3 whose layers see 64 tokens only, every second one in the hybrid. The same
seed makes the same weights. The words of the tokenizer are w3, w4, ... w511, and each is the token of its number, so
that a test knows the tokens of a text and the text of tokens.
"""

# pyright: basic, reportMissingImports=false
from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCABULARY = 512
LONGEST = 8192
WINDOW = 64
_BEGIN, _END, _UNKNOWN = "<begin>", "<end>", "<unknown>"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, parted by blanks."""
    words = [_BEGIN, _END, _UNKNOWN, *(f"w{token}" for token in range(3, VOCABULARY))]
    tokenizer = Tokenizer(WordLevel({word: token for token, word in enumerate(words)}, unk_token=_UNKNOWN))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=_BEGIN, eos_token=_END, unk_token=_UNKNOWN, model_max_length=LONGEST
    )
    fast.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return fast


def make_model(seed: int, layers: int = 2, width: int = 64) -> LlamaForCausalLM:
    """By default two layers of width 64: small enough that an engine's own work is all that takes time."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        max_position_embeddings=LONGEST,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).to(torch.float32)


def make_windowed(*, is_hybrid: bool) -> Gemma3ForCausalLM:
    """Sliding windows, and full attention by turns in a hybrid: vLLM makes a KV cache group of each kind."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=LONGEST,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention" if is_hybrid else "sliding_attention"] * 2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        initializer_range=0.2,
    )
    return Gemma3ForCausalLM(config).to(torch.float32)


def main(folder: Path, *words: str) -> None:
    """Write both to the folder."""
    make_tokenizer().save_pretrained(folder)
    if words in (("hybrid",), ("windowed",)):
        model: PreTrainedModel = make_windowed(is_hybrid=words == ("hybrid",))
    else:
        model = make_model(*map(int, words or ("0",)))
    model.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
