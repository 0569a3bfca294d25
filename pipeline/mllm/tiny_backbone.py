"""Builds the tiny backbone: an Idefics3 with random weights, and a BPE tokenizer trained on the catalogue's words."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Idefics3Config, Idefics3ImageProcessorPil, PreTrainedTokenizerFast

from pipeline.core.config import TinyConfig

TOKENIZER = 2  # version; raise it when the same texts would give another tokenizer
SPECIAL = ["<|pad|>", "<|end|>", "<image>", "<fake_token_around_image>", "<global-img>"]


def train_tokenizer(vocab: int, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer of `vocab` tokens."""
    bpe = Tokenizer(models.BPE())
    # single digits, as in published models: a year that no session has shown begins like the years before it
    words = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Sequence(words), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=max(vocab, 300), special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator((f" {text}" for text in texts), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=SPECIAL[0], eos_token=SPECIAL[1], extra_special_tokens=SPECIAL[2:])


def tiny_config(tiny: TinyConfig, tokenizer: PreTrainedTokenizerFast) -> Idefics3Config:
    """Returns the config of the model, with the tokenizer's vocabulary."""
    vision = {
        "hidden_size": tiny.vision_dim,
        "intermediate_size": 4 * tiny.vision_dim,
        "num_hidden_layers": tiny.vision_layers,
        "num_attention_heads": tiny.heads,
        "image_size": tiny.image_size,
        "patch_size": tiny.patch,
        "initializer_range": tiny.vision_dim**-0.5,
    }
    text = {
        "model_type": "llama",
        "vocab_size": len(tokenizer),
        "hidden_size": tiny.dim,
        "intermediate_size": 3 * tiny.dim,
        "num_hidden_layers": tiny.layers,
        "num_attention_heads": tiny.heads,
        "num_key_value_heads": tiny.heads,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": tiny.dim**-0.5,
    }
    return Idefics3Config(
        vision_config=vision,
        text_config=text,
        # the usual 0.02 suits widths of 2,500; at small widths attention is too flat, and the last token hardly attends to the item
        initializer_range=tiny.dim**-0.5,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=tiny.merge,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )


def tiny_processor(tiny: TinyConfig) -> Idefics3ImageProcessorPil:
    """Returns the image processor, which scales every image to one size."""
    side = {"longest_edge": tiny.image_size}
    return Idefics3ImageProcessorPil(size=side, max_image_size=side, do_image_splitting=False)
