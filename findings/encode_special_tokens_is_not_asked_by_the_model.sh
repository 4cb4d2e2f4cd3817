#!/usr/bin/env bash
# tokenizers 0.23.3: with encode_special_tokens = True the text of a special token in a document may still become that token.
#
# Expected: with the flag the special tokens in a text are encoded as ordinary text, so that no text of a user or of a
# corpus can give the id that ends a document. Of a byte-level BPE it is so.
# Seen: the flag only switches off the search for special tokens before the model. A Unigram, as T5, XLM-R, mT5 and ALBERT
# have it, holds "</s>" among its pieces, with the best score, and gives its id for these four characters; so does every
# model that looks up whole words (WordLevel, WordPiece, BPE with ignore_merges) if the pre-tokenizer leaves the text whole.
# So a web page about HTML ends documents in a corpus that is packed by eos, without an error or a warning.
# A reader has to cut such texts after the pre-tokenizer: a Split of "<(?=/s>)", merged_with_previous, behind it does.
#
# Exit 0 while this is so, 1 once it changes. Needs Python 3.10 or newer and a package index.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
"$folder/venv/bin/python" - <<'EOF'
import sys

import tokenizers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

print("tokenizers", tokenizers.__version__)
pieces = {"</s>": 0.0, "<unk>": 0.0, "▁": -2.0, **dict.fromkeys("ab</s>", -3.0)}
vocab = {piece: i for i, piece in enumerate(pieces)}
unigram = models.Unigram(list(pieces.items()), unk_id=1, byte_fallback=False)
words = models.WordLevel(vocab | {"a</s>b": len(vocab)}, unk_token="<unk>")
KINDS = {
    "Unigram, as T5": (unigram, pre_tokenizers.Metaspace(), "a</s>b"),
    "WordLevel": (words, pre_tokenizers.WhitespaceSplit(), "a </s> b"),
    "BPE without such a merge": (models.BPE(vocab, [], unk_token="<unk>"), pre_tokenizers.Metaspace(), "a</s>b"),
}
seen = {}
for name, (model, before, text) in KINDS.items():
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = before
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.encode_special_tokens = True
    plain = tokenizer.encode(text, add_special_tokens=False).tokens
    cut = pre_tokenizers.Split(Regex("<(?=/s>)"), "merged_with_previous")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([before, cut])
    mended = tokenizer.encode(text, add_special_tokens=False).tokens
    seen[name] = "</s>" in plain, "</s>" in mended
    print(f"{name:25} {text!r}: {plain}; cut: {mended}")
if seen != {"Unigram, as T5": (True, False), "WordLevel": (True, False), "BPE without such a merge": (False, False)}:
    sys.exit("this has changed")
EOF
