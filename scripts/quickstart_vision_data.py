"""The quickstart's images: scikit-learn's handwritten digits, a fifth of the training labels wrong.

    python scripts/quickstart_vision_data.py data/quickstart_vision/digits

    train.npz   1,438 images of 8 x 8 pixels and their labels, a fifth of which are wrong
    test.npz    359 images, unchanged

The images are real; only the wrong labels are synthetic, from a fixed seed.
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

WRONG_SHARE = 0.2


def main(folder: Path) -> None:
    digits = load_digits()
    images, labels = np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)
    is_test = np.arange(len(labels)) % 5 == 4
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "test.npz", images=images[is_test], labels=labels[is_test])
    train, rng = labels[~is_test], np.random.default_rng(0)
    wrong = rng.permutation(len(train))[: round(WRONG_SHARE * len(train))]
    train[wrong] = (train[wrong] + rng.integers(1, 10, len(wrong))) % 10
    np.savez(folder / "train.npz", images=images[~is_test], labels=train)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
