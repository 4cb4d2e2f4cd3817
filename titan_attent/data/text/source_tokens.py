"""The tokens of each data source, and its documents as a data set of its own.

Cost: the index alone; for documents the table of spans (spans.py).
"""

from titan_attent.data.examples import Examples
from titan_attent.data.plan.source import SourceExamples, spans_by_name
from titan_attent.data.text.document_examples import DocumentDataset


def tokens_by_source(dataset: Examples) -> dict[str, int]:
    """The tokens that a pass over each source trains, padding not counted, in the order of the data.

    A source in which no example begins has none.
    """
    if not isinstance(dataset, DocumentDataset):
        spans = spans_by_name(dataset.sources, num_examples=len(dataset))
        sizes = {name: sum(stop - start for start, stop in parts) for name, parts in spans.items()}
        names = _names(dataset) or list(sizes)
        return {name: sizes.get(name, 0) * dataset.tokens_per_example for name in names}
    tokens = dict.fromkeys(_names(dataset), 0)
    for shard in dataset.shards.index.shards:
        tokens[shard.source] += shard.num_tokens - shard.num_documents  # a document's first token is no label
    return tokens


def _names(dataset: Examples) -> list[str]:
    """The sources in the index of text; empty for other data."""
    shards = getattr(dataset, "shards", None)
    return list(dict.fromkeys(shard.source for shard in shards.index.shards)) if shards is not None else []


def examples_by_source(dataset: DocumentDataset) -> dict[str, SourceExamples]:
    """The documents of each source that has an example."""
    tokens = tokens_by_source(dataset)
    spans = spans_by_name(dataset.sources, num_examples=len(dataset))
    return {name: SourceExamples(dataset, parts, num_tokens=tokens[name]) for name, parts in spans.items()}
