"""From the words after ``--input`` to a source of samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipecompile.errors import InputError
from pipecompile.ir.package import Package
from pipecompile.sources import Camera, ImageFolder, NumpyFile, Random, Source, VideoFile


def open_source(text: str, package: Package, *, realtime: bool = False, rate: float | None = None) -> Source:
    """The source that ``text`` means, fitted to what ``package`` takes.

    ``rate`` is in samples a second, for sources without times of their own.

    Raises:
        InputError: if the text is not understood, or the source cannot be opened or does not fit.
    """
    kind, _, rest = text.partition(":")
    pace: dict[str, Any] = {"like": package, "realtime": realtime, **({} if rate is None else {"rate": rate})}
    if kind == "random":
        if not rest.isdigit() or int(rest) < 1:
            raise InputError(f"--input {text!r} is not understood: write random:100 for a hundred samples")
        return Random(int(rest), **pace)
    if not text:
        raise InputError("--input is empty: name a file, a folder, random:100 or camera:/dev/video0")
    path = Path(text)
    if path.is_dir():
        return ImageFolder(path, **pace)
    if path.suffix == ".npy":
        return NumpyFile(path, **pace)
    if rate is not None:
        raise InputError(f"--rate is for sources without times of their own; {text} has its own")
    if kind == "camera" or "://" in text:
        if realtime:
            raise InputError("--realtime is for files: a camera is live anyway")
        if kind == "camera" and not rest:
            raise InputError("--input camera: names no device: write camera:/dev/video0")
        return Camera(rest if kind == "camera" else text, like=package)
    if not path.exists():
        raise InputError(f"--input {text}: there is no such file or folder")
    return VideoFile(path, like=package, realtime=realtime)


class Limited:
    """At most ``count`` samples of a source, and none after :meth:`stop`. Keeps what a stream asks its source."""

    def __init__(self, source: Source, count: int | None) -> None:
        self.live = source.live
        self._source, self._count, self.stopped = source, count, False

    @property
    def skipped(self) -> int:
        """See ``Source.skipped``."""
        return self._source.skipped

    def stop(self) -> None:
        """Give no further sample; ends a wait for one, too."""
        self.stopped = True
        self._source.close()

    def __iter__(self) -> Iterator[Any]:
        if self._count == 0:
            return
        for number, sample in enumerate(self._source, 1):
            if self.stopped:
                return
            yield sample
            if number == self._count:
                return
