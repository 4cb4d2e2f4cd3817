"""The text and the images that experiments train on, built without a network where possible.

    stdlib_code.py    rows of the Python standard library: clean, with junk, with copies
    texts.py          documents of ten kinds, from pinned Python packages and Debian packages
    image_sets.py     digits and Fashion-MNIST, and functions that make them dirty

Each is a command that writes its data: ``python -m benchmarks.corpora.stdlib_code --output DIR``.
"""
