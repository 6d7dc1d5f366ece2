"""Rebuild lenet_deploy/digits.npz from scikit-learn's load_digits: python scripts/make_digits.py OUT.npz

The 1,797 real scans of the UCI "Optical Recognition of Handwritten Digits" test set (Alpaydin and Kaynak, 1998; CC BY 4.0),
8x8 pixels of 0 to 16, here 0 to 255. The split is stratified, 80 to 20, with a fixed seed.
"""

import sys

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def digits() -> dict[str, np.ndarray]:
    """Arrays by name: images uint8 (N, 8, 8), labels uint8 (N,)."""
    images, labels = load_digits(return_X_y=True)
    pixels = np.rint(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    split = train_test_split(pixels, labels.astype(np.uint8), test_size=0.2, random_state=0, stratify=labels)
    return dict(zip(("train_images", "test_images", "train_labels", "test_labels"), split, strict=True))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    np.savez_compressed(sys.argv[1], **digits())
