"""The examples of a data set as people see them: text or thumbnails, lengths, sources.

Cost: the index; where documents are the unit, 4 bytes per document for the table of spans.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from titan_attent.data.examples import Examples, ScoredData
from titan_attent.data.images import ImageDataset
from titan_attent.data.io.folder import INDEX_FILE
from titan_attent.data.text.decoded import DecodedExamples
from titan_attent.data.text.document_examples import DOCUMENT, DocumentDataset
from titan_attent.data.text.shards import TokenDataset, TokenShards

DEFAULT_SEQ_LEN = 2048
"""torchtitan's default of training.seq_len."""
THUMBNAIL = 128
"""Side in pixels of the thumbnails of images that are stored as files, or are larger."""


class ImageSubject:
    """An image data set, with what the teacher's checks read of a run's examples.

    Args:
        images: the data set.
        scored_size: the side at which the scores were computed; 0 without scores.
    """

    def __init__(self, images: ImageDataset, *, scored_size: int):
        self.images, self.seq_len = images, scored_size or images.size
        self.sources = images.sources
        self.columns: tuple[str, ...] = ()
        self.stored, self.tokens_per_example, self.num_rows = images, 1, len(images)
        self.scored = ScoredData(images.fingerprint, self.seq_len, len(images))
        self.chance_loss = float(np.log(max(2, len(images.classes))))

    def __len__(self) -> int:
        return len(self.images)

    def location(self, i: int) -> dict[str, Any]:
        file, slot = self.images.locate(i)
        return {"shard": file, "image": slot}

    def read(self, ids: torch.Tensor, visit_key: tuple[int, ...] | None = None) -> Any:
        raise AssertionError("no model reads these examples")


class Subject:
    """The data set in a folder.

    Args:
        path: the folder.
        unit: "window", "document", or "" for that of the scores, or else documents if the data set knows them.
        seq_len: tokens of a window, or the most of a span; 0 for that of the scores, or else :data:`DEFAULT_SEQ_LEN`.
        scored_length: tokens of an example or the side of an image that scores are for, 0 for documents; None without
            scores.

    Attributes:
        dataset: its examples, as a run reads them.
        unit: the word for one example: "window", "document", "span of a document" or "image".
        is_text: whether they are text.

    Raises:
        ValueError: the folder holds no data set, or cannot be read with these options.
    """

    def __init__(self, path: str, *, unit: str = "", seq_len: int = 0, scored_length: int | None = None):
        self.path = Path(path)
        self.is_text = not _is_of_images(self.path)
        self.dataset: Examples
        if not self.is_text:
            if unit or seq_len:
                raise ValueError(f"{path} holds images: leave out --unit and --seq-len")
            self.images = _open_images(self.path)
            self.dataset, self.unit = ImageSubject(self.images, scored_size=scored_length or 0), "image"
            return
        shards, seq_len = TokenShards(path), seq_len or scored_length or DEFAULT_SEQ_LEN
        knows_documents = shards.has_documents if scored_length is None else scored_length == 0
        unit = unit or (DOCUMENT if knows_documents else "window")
        text = DocumentDataset(shards, seq_len=seq_len) if unit == DOCUMENT else TokenDataset(shards, seq_len=seq_len)
        self.dataset, self.decoded = text, DecodedExamples(text)
        self.unit = unit
        if isinstance(text, DocumentDataset) and len(text) > shards.index.num_documents:
            self.unit = "span of a document"

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [N], the tokens of each example; ones for images."""
        if isinstance(self.dataset, DocumentDataset):
            starts = range(0, len(self), 1 << 20)
            parts = [self.dataset.lengths(np.arange(i, min(i + (1 << 20), len(self)))) for i in starts]
            return np.concatenate(parts)
        return np.full(len(self), self.dataset.seq_len if self.is_text else 1, dtype=np.int64)

    @cached_property
    def source_names(self) -> list[str]:
        """The names of the sources, in the order in which they first appear."""
        return list(dict.fromkeys(name for name, _ in self.dataset.sources))

    @cached_property
    def source_of(self) -> np.ndarray:
        """int32 [N], the index of each example's source in :attr:`source_names`."""
        spans = self.dataset.sources
        number = {name: i for i, name in enumerate(self.source_names)}
        sizes = np.diff([first for _, first in spans] + [len(self)])
        return np.repeat(np.array([number[name] for name, _ in spans], dtype=np.int32), sizes)

    def class_of(self, ids: np.ndarray) -> list[str]:
        """The class of each image."""
        labels = self.images.labels(torch.from_numpy(ids))
        return [self.images.classes[label] for label in labels.tolist()]

    def thumbnail(self, i: int) -> Image.Image:
        """A square picture of image i."""
        return self.images.thumbnail(i)


def _is_of_images(path: Path) -> bool:
    try:
        index = json.loads((path / INDEX_FILE).read_bytes())
        return isinstance(index, dict) and index.get("format") == "titan_attent.images"
    except (OSError, ValueError, RecursionError):
        return False  # TokenShards says what is wrong


def _open_images(path: Path) -> ImageDataset:
    """The images at their own size if they are stored as small squares; else scaled."""
    index = json.loads((path / INDEX_FILE).read_bytes())
    height = index.get("height")
    is_small = isinstance(height, int) and height == index.get("width") and height <= THUMBNAIL
    return ImageDataset(path, size=0 if is_small else THUMBNAIL)
