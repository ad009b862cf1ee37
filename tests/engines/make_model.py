"""Make a model for the engine tests: a tiny Llama with random weights and a tokenizer of its own; downloads nothing.

Run by the Python of the engine's environment:

    VENV/bin/python tests/engines/make_model.py FOLDER [SEED [LAYERS WIDTH]]

The same seed makes the same weights. The words of the tokenizer are w3, w4, ... w511, and each is the token of its
number, so that a test knows the tokens of a text and the text of tokens.
"""

# pyright: basic, reportMissingImports=false
from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 512
LONGEST = 8192
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


def main(folder: Path, *numbers: int) -> None:
    """Write both to the folder."""
    make_tokenizer().save_pretrained(folder)
    make_model(*(numbers or (0,))).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
