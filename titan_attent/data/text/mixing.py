"""How many documents share an example. Where it is more than one, its loss is the mean of unlike things.

Cost: 256 reads of an example, once a run, on one rank.
"""

import torch

from titan_attent.data.examples import Examples
from titan_attent.data.plan.order import OrderCursor
from titan_attent.data.text.shards import TokenDataset

NUM_SAMPLED = 256


def documents_per_example(dataset: Examples) -> float:
    """The mean number of documents that an example takes its inputs from, by a sample of them; 1.0 for images.

    Documents end with the eos id, so that each eos before an example's last input begins another document in it.
    """
    if not isinstance(dataset, TokenDataset):
        return 1.0
    sample = OrderCursor(len(dataset), 0)
    sample.take(min(NUM_SAMPLED, len(dataset)))
    pool, eos_id = sample.pool(), dataset.shards.tokenizer_info["eos_id"]
    places = torch.arange(min(NUM_SAMPLED, len(dataset)))
    ends = sum(int((dataset.batch(pool.ids(place))[0][:, :-1] == eos_id).sum()) for place in places.split(16))
    return 1.0 + ends / len(places)
