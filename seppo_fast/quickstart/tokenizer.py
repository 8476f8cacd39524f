"""A CLIP tokenizer that learns its byte-pair merges from the captions, and a T5 tokenizer of their words."""

import json
import string
from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, T5TokenizerFast

START, END = "<|startoftext|>", "<|endoftext|>"
LENGTH = 77


def train_tokenizer(captions: Sequence[str], vocabulary: int = 600, length: int = LENGTH) -> CLIPTokenizer:
    """A tokenizer in which each word of `captions` is one token; it encodes any other text byte by byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # Words are counted in lower case and without spaces, as CLIP's own pre-tokenizer will see them.
    words = [word for caption in captions for word in caption.lower().split()]
    learner.train_from_iterator(words, trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False,
    ))
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]
    # CLIP's order: bytes, bytes that end a word, merges, start, end. CLIPTextModel pools at the end token.
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in merges), START, END]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def new_t5_tokenizer(captions: Sequence[str], length: int) -> T5TokenizerFast:
    """A T5 tokenizer in which each word of `captions` is one token; it spells other words in letters."""
    words = sorted({"\u2581" + word for caption in captions for word in caption.split()})
    pieces = ["<pad>", "</s>", "<unk>", *words, "\u2581", *string.ascii_lowercase]
    return T5TokenizerFast(vocab=[(piece, -float(rank)) for rank, piece in enumerate(pieces)], extra_ids=0, model_max_length=length)
