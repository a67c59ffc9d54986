"""Where the bundled laboratory lies, and its tokenizer."""

from __future__ import annotations

import string
from pathlib import Path

__all__ = ["ADAPTERS", "BASE", "DATA", "NAME", "bundled", "make_tokenizer"]

DATA = Path(__file__).parent / "data"
BASE, ADAPTERS = DATA / "base", DATA / "adapters"
NAME = "workbench/nano-base"  # what the bundled pool's configurations call their base
_ALPHABET = "\n" + " " + string.ascii_lowercase + string.ascii_uppercase + string.digits + ",.:;=<>[]{}\"'*-+/?!_|#()"


def bundled(base: str) -> str:
    """A base as `Base.load` takes it: the folder of the bundled one where its name is given, else as it is."""
    return str(BASE) if base == NAME and BASE.is_dir() else base


def make_tokenizer():
    """A character-level tokenizer as an ordinary `PreTrainedTokenizerFast`; a new line ends an answer."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<pad>", "<unk>", *_ALPHABET])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="\n",
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
