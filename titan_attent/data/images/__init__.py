"""Images: from files of many kinds to shards, and from shards to augmented batches.

inputs.py      folders, parquet, npz and tar files -> images and labels    folders.py, splits.py, kinds.py; arrays.py;
     |                                                                     tables.py; tars.py, archive.py
     |
classes.py     labels as they were found -> numbers of classes
     |
pictures.py    bytes <-> pictures                                          Pillow
     |
writer.py      images -> shards on disk                                    __main__.py: the command
     |
format.py      shards and index.json                                       hashes, fingerprint
     |
shards.py      example id -> label and bytes                               positioned reads
     |
dataset.py     (seed, turn, example id) -> pixels                          augment.py
"""

from titan_attent.data.images.augment import Augmentation
from titan_attent.data.images.dataset import ImageDataset
from titan_attent.data.images.summary import ImageSummary
from titan_attent.data.images.writer import write_images

__all__ = ["Augmentation", "ImageDataset", "ImageSummary", "write_images"]
