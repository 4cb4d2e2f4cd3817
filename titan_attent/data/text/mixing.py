"""Counts the documents per example. The loss of an example with several documents is a mean over unrelated texts.

Cost: 256 example reads, once per run, on one rank.
"""

import torch

from titan_attent.data.examples import Examples
from titan_attent.data.plan.order import OrderCursor
from titan_attent.data.text.shards import TokenDataset

NUM_SAMPLED = 256


def documents_per_example(dataset: Examples) -> float:
    """The mean number of documents in the inputs of an example, estimated from a sample.

    It is 1.0 for images and for spans of documents.

    Documents end with the eos id, so each eos before the last input of an example adds one document.
    """
    if not isinstance(dataset, TokenDataset):
        return 1.0
    sample = OrderCursor(len(dataset), 0)
    sample.take(min(NUM_SAMPLED, len(dataset)))
    pool, eos_id = sample.pool(), dataset.shards.tokenizer_info["eos_id"]
    slots = torch.arange(min(NUM_SAMPLED, len(dataset)))
    ends = sum(int((dataset.batch(pool.ids(part))[0][:, :-1] == eos_id).sum()) for part in slots.split(16))
    return 1.0 + ends / len(slots)
