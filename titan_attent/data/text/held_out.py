"""Which documents are validation data: a keyed hash of their text decides, and nothing else.

So the same documents are held out for every order of the inputs, on every machine, in a run that is resumed, and
after documents were added. Copies of a document are all held out or all trained on: none is in both sets.

Cost: one hash of every text.
"""

import hashlib

TRAIN, VALIDATION = "train", "validation"
"""The folders of the two sets."""
_KEY = b"titan_attent validation"
"""With another key, other documents would be held out."""


def check_fraction(fraction: float) -> None:
    """ValueError unless ``fraction`` is a share of the documents that leaves some for training."""
    if not 0 < fraction <= 0.5:
        raise ValueError(
            f"validation_fraction is {fraction}; it is the share of the documents to hold out, above 0 and at most 0.5"
        )


def is_held_out(text: str | None, fraction: float) -> bool:
    """Whether the document ``text`` belongs to the validation data, which get about this fraction of all documents.

    An unusable document has the text None, and belongs to neither.
    """
    if text is None:
        return False
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=_KEY).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
