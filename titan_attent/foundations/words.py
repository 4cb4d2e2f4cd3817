"""Sentences for people: numbers with their nouns."""


def counted(number: int, noun: str, nouns: str = "") -> str:
    """``1 shard``, ``2,000 shards``; ``nouns``: a plural that is not the noun and an s."""
    return f"{number:,} {noun if number == 1 else nouns or noun + 's'}"
