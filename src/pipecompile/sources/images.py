"""Pictures of a folder, in the order of their names."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import numpy as np

from pipecompile.errors import InputError
from pipecompile.sources.fit import Picture, package_of
from pipecompile.sources.source import Source, check_rate


class ImageFolder(Source):
    """Every picture in a folder and the folders below it; ``frame9.png`` comes before ``frame10.png``.

    Pictures are turned as their EXIF data says. Files whose names end in nothing a picture's does,
    and hidden ones, are left out. Needs Pillow (``pip install 'pipecompile[video]'``).

    Args:
        path: the folder.
        like: a pipeline (or package) with one input of shape 1x3xHxW (or 3xHxW, 1xHxWx3; 1 channel
            for grey): pictures are resized to it, and scaled to 0 .. 1 where it is of floats.
        transform: makes an item of a stream from a picture (rows x columns x 3, uint8); instead of
            ``like``. With neither, an item is a 1x3xHxW float32 tensor, 0 to 1, of the picture's size.
        rate: pictures a second, for the time stamps.
        realtime: give pictures at that rate, as a live source.

    Raises:
        InputError: if there is no such folder, no picture in it, or pictures do not fit. While
            iterating: if a file is no picture, or is damaged.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        like: Any = None,
        transform: Callable[[np.ndarray[Any, Any]], Any] | None = None,
        rate: float = 1.0,
        realtime: bool = False,
    ) -> None:
        super().__init__(realtime=realtime)
        self.path, self._rate = Path(path), check_rate(rate)
        try:
            from PIL import Image
        except ImportError:
            raise InputError(f"reading pictures in {path} needs Pillow: pip install 'pipecompile[video]'") from None
        if not self.path.is_dir():
            raise InputError(f"{self.path}: there is no such folder")
        known = Image.registered_extensions()
        self.files = sorted(
            (
                file
                for file in self.path.rglob("*")
                if file.suffix.lower() in known
                and file.is_file()
                and not any(part.startswith(".") for part in file.relative_to(self.path).parts)
            ),
            key=lambda file: _natural(file.relative_to(self.path)),
        )
        if not self.files:
            raise InputError(f"{self.path}: there is no picture in this folder")
        self.length = len(self.files)
        self._picture = Picture(None) if like is None else Picture.like(package_of(like), str(self.path))
        self._transform = transform

    def _read(self, stop: threading.Event) -> Generator[tuple[float, Any]]:
        for index, file in enumerate(self.files):
            yield index / self._rate, file

    def _finish(self, raw: Any) -> Any:
        from PIL import Image, ImageOps, UnidentifiedImageError

        picture = self._picture if self._transform is None else Picture(None)
        try:
            with Image.open(raw) as image:
                turned = ImageOps.exif_transpose(image).convert("RGB" if picture.channels == 3 else "L")
                if picture.size is not None and self._transform is None:
                    height, width = picture.size
                    turned = turned.resize((width, height), Image.Resampling.BILINEAR)
                pixels = np.array(turned)
        except UnidentifiedImageError:
            raise InputError(f"{raw} is no picture, whatever its name says") from None
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's ways to say that a file is damaged
            raise InputError(f"{raw} cannot be read as a picture: {error}") from None
        return self._transform(pixels) if self._transform is not None else picture.item(pixels)


def _natural(path: Path) -> list[list[tuple[int, int, str]]]:
    """Sort key: numbers within names count as numbers."""
    return [
        [(0, int(word), "") if word.isdigit() else (1, 0, word) for word in re.split(r"(\d+)", part) if word]
        for part in path.parts
    ]
