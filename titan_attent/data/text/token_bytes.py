"""The bytes of text that each token id stands for, from the tokenizer in the folder of a data set.

A loss in nats per token depends on how much text a token holds. In bits per byte of text, losses of models with
different tokenizers compare: the sum of the losses, in bits, over the bytes of the tokens that they are of.

The eos counts as one byte: it says where a document ends, once per document for every tokenizer. A special token counts
the bytes of its text. An id without a token counts none.

Cost: 4 bytes per id, made once.
"""

import numpy as np

from titan_attent.data.text.shards import TokenShards
from titan_attent.data.text.tokenizer import Tokenizer, open_tokenizer

EOS_BYTES = 1


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """int32 [V], the bytes of each id of ``tokenizer``."""
    return np.array([_num_bytes(tokenizer, i) for i in range(tokenizer.vocab_size)], dtype=np.int32)


def _num_bytes(tokenizer: Tokenizer, token_id: int) -> int:
    if token_id == tokenizer.eos_id:
        return EOS_BYTES
    content = tokenizer.bytes_of(token_id)
    return 0 if content is None else len(content)


def token_bytes_of(shards: TokenShards) -> np.ndarray | None:
    """:func:`token_bytes` of the tokenizer of a data set; None if its index names no tokenizer file.

    Raises:
        ValueError: the file is missing or changed.
        NoBytesError: the text of a token depends on its neighbours (json_token_bytes.py).
    """
    if "file" not in shards.tokenizer_info:
        return None
    return token_bytes(open_tokenizer(shards.tokenizer_info, shards.path))
