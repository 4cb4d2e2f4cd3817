"""Images: from files of many kinds to shards, and from shards to augmented batches.

inputs.py      folders, parquet, npz and tar files -> images and labels    folders.py, splits.py, kinds.py; arrays.py;
     |                                                                     tables.py; tars.py, archive.py; what each
     |                                                                     gives: examples.py
     |
classes.py     labels as they were found -> numbers of classes
     |
pictures.py    bytes <-> pictures                                          Pillow; by several threads: prepare.py
     |
writer.py      images -> shards on disk                                    output.py: the folder; __main__.py: the
     |                                                                     command; summary.py: what it tells
     |
format.py      shards and index.json                                       hashes, fingerprint
     |
shards.py      example id -> label and bytes                               positioned reads
     |
dataset.py     (seed, visit key, example id) -> pixels                     augment.py
"""

from titan_attent.data.images.augment import Augmentation
from titan_attent.data.images.dataset import ImageDataset
from titan_attent.data.images.summary import ImageSummary
from titan_attent.data.images.writer import write_images

__all__ = ["Augmentation", "ImageDataset", "ImageSummary", "write_images"]
