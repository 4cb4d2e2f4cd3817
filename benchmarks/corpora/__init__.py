"""The text and the images that experiments learn from, made without a network where possible.

    stdlib_code.py    rows of the Python standard library: clean, with junk, with copies
    texts.py          documents of thirteen kinds, of pinned Python packages and Debian's
    image_sets.py     digits and Fashion-MNIST, and the ways in which they are made dirty

Each is a command that writes its data: ``python -m benchmarks.corpora.stdlib_code --output DIR``.
"""
