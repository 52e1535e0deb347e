"""Generated images that belong to real ones, k copies of each: which file is which, and which are missing."""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from common import images
from common.datasets import Generated, Images
from common.files import class_folders, write_metadata


class Copies:
    """k copies of each image of a set; root/<class>/<j><suffix>, where j = copy * n_c + the image's place in its class.

    A set of fewer copies is then the first files of one of more. rows: the set's images among the real ones, which lie
    class by class; n_c of them are of class c.
    """

    def __init__(self, root: Path, real: Images, rows: Sequence[int], k: int, suffix: str = ".png"):
        self.root, self.real, self.rows, self.k, self.suffix = root, real, rows, k, suffix
        self.folders, self.labels = class_folders(real.class_names), real.labels[rows]
        self.counts = np.bincount(self.labels, minlength=len(self.folders))
        self.starts = np.cumsum(self.counts) - self.counts
        self.places = np.arange(len(rows)) - self.starts[self.labels]  # of each image in its class

    def __len__(self) -> int:
        return len(self.rows) * self.k

    def images(self, k: int | None = None) -> Generated:
        """The first k copies (all), class by class; nothing is listed."""
        return Generated(self.root, self.real.class_names, (k or self.k) * self.counts, self.suffix)

    @cached_property
    def _place_of(self) -> dict[int, int]:
        """Real image -> its place in its class"""
        return dict(zip(self.rows, self.places.tolist(), strict=True))

    def key(self, i: int, copy: int) -> str:
        """Name below root of a copy of the real image i. KeyError: i is none of the set's."""
        place, c = self._place_of[i], self.real.labels[i]
        return f"{self.folders[c]}/{copy * self.counts[c] + place}{self.suffix}"

    def file(self, i: int, copy: int) -> Path:
        """Path of a copy of the real image i."""
        return self.root / self.key(i, copy)

    def missing(self) -> dict[int, list[int]]:
        """{real image: its copies that are not there}, by one listing of each folder"""
        there = np.concatenate([
            images.existing(self.root / folder, self.k * n, self.suffix)
            for folder, n in zip(self.folders, self.counts, strict=True)
        ])  # fmt: skip
        n, first = self.counts[self.labels], self.k * self.starts[self.labels]  # of each image's class
        gone = np.stack([~there[first + copy * n + self.places] for copy in range(self.k)], 1)  # [image, copy]
        return {self.rows[m]: np.flatnonzero(gone[m]).tolist() for m in np.flatnonzero(gone.any(1)).tolist()}

    def write_list(self, about: Callable[[int, int], dict[str, Any]]) -> None:
        """root/metadata.jsonl: file name, label, class name, and about(i, copy). UserError: an image is missing."""
        images.check_all_there(self.root, self.folders, self.k * self.counts, self.suffix)

        names, rows = self.real.class_names, list(zip(self.rows, self.labels.tolist(), strict=True))
        write_metadata(self.root, (
            dict(file_name=self.key(i, copy), label=c, class_name=names[c], **about(i, copy))
            for copy in range(self.k) for i, c in rows
        ))  # fmt: skip
