"""Images: from files in several formats to shards, and from shards to augmented batches.

inputs.py      folders, parquet, npz and tar files -> images and labels    folders.py, splits.py, file_types.py;
     |                                                                     arrays.py; tables.py; tars.py, archive.py;
     |                                                                     the types that they share: examples.py
     |
classes.py     labels as the inputs give them -> class indices
     |
pictures.py    bytes <-> Pillow pictures                                   by several threads: prepare.py
     |
writer.py      images -> shards on disk                                    output.py: the folder; __main__.py: the
     |                                                                     command; summary.py: its printed summary
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
