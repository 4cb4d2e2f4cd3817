"""Small files ``tokenizer.json`` of three kinds, trained by the library `tokenizers`, as models come with them."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

EOS = {"byte_level": "<|endoftext|>", "unigram": "</s>", "word_piece": "[SEP]"}
"""Each kind, and its eos."""


def train(kind: str, texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """A tokenizer of the ``kind``: byte-level BPE like GPT-2, a Unigram like T5 with bytes, a WordPiece like BERT."""
    special = {"special_tokens": [EOS[kind], "<|im_start|>"], "show_progress": False}
    if kind == "byte_level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, **special)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(), decoders.Fuse()])
        trainer = trainers.UnigramTrainer(vocab_size=vocab_size - 256, unk_token="<unk>", **special)
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        special["special_tokens"].insert(0, "[UNK]")
        trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, **special)
    tokenizer.train_from_iterator(texts, trainer=trainer)
    if kind == "unigram":  # the trainer has no bytes; SentencePiece puts them before the pieces
        fields = json.loads(tokenizer.to_str())
        lowest = min(score for _, score in fields["model"]["vocab"])
        pieces = fields["model"]["vocab"] + [[f"<0x{byte:02X}>", lowest - 10] for byte in range(256)]
        fields["model"] |= {"vocab": [*pieces, ["<unk>", 0.0]], "unk_id": len(pieces), "byte_fallback": True}
        tokenizer = Tokenizer.from_str(json.dumps(fields))
    number = tokenizer.token_to_id(EOS[kind])
    # What files of models have, and a data set must not: a bos before each text, an eos behind it, a maximum length.
    template = f"{EOS[kind]} $A {EOS[kind]}"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[(EOS[kind], number)])
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer, *, eos: str = "") -> Path:
    """``tokenizer.json`` in ``folder``, and with ``eos`` a ``tokenizer_config.json``. Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if eos:
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    return folder
