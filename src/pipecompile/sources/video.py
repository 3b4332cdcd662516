"""Frames of a video file or a camera, through PyAV."""

from __future__ import annotations

import os
import stat
import threading
from abc import abstractmethod
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pipecompile.errors import InputError
from pipecompile.sources.fit import Picture, package_of
from pipecompile.sources.pipe import PipeReader
from pipecompile.sources.source import Source

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

#: Seconds to wait for a network source to answer and for its next data.
_TIMEOUT = (15.0, 10.0)


class _Frames(Source):
    """Decodes a container's first video stream in one thread."""

    def __init__(
        self,
        name: str,
        like: Any,
        transform: Callable[[np.ndarray[Any, Any]], Any] | None,
        *,
        realtime: bool = False,
    ) -> None:
        super().__init__(realtime=realtime)
        try:
            import av  # noqa: F401 # pyright: ignore[reportUnusedImport]
        except ImportError:
            raise InputError(f"reading {name} needs PyAV: pip install 'pipecompile[video]'") from None
        self.name = name
        #: Frames a second, as far as the source says.
        self.rate: float | None = None
        self._picture = Picture(None) if like is None else Picture.like(package_of(like), name)
        self._transform = transform

    @abstractmethod
    def _open(self, stop: threading.Event) -> InputContainer:
        """Open the container anew."""

    def _read(self, stop: threading.Event) -> Generator[tuple[float, VideoFrame]]:
        with self._open(stop) as container:
            stream = _video_of(container, self.name)
            # Other cores are the pipeline's.
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
            rate = float(stream.average_rate or stream.guessed_rate or 0) or 30.0
            for number, frame in enumerate(self._decode(container, stream, stop)):
                if stop.is_set():
                    return
                pts: Any = frame.time  # absent where the stream carries no times
                yield number / rate if pts is None else pts, frame

    @abstractmethod
    def _decode(self, container: InputContainer, stream: VideoStream, stop: threading.Event) -> Generator[VideoFrame]:
        """All frames."""

    def _finish(self, raw: Any) -> Any:
        if self._transform is not None:
            return self._transform(raw.to_ndarray(format="rgb24"))
        picture = self._picture
        height, width = picture.size or (raw.height, raw.width)
        return picture.item(raw.reformat(width, height, format=picture.format).to_ndarray())


class VideoFile(_Frames):
    """The frames of a video file, in order.

    Args:
        path: anything FFmpeg reads.
        like: a pipeline (or package) with one input of shape 1x3xHxW (or 3xHxW, 1xHxWx3; 1 channel
            for grey): frames are resized to it, and scaled to 0 .. 1 where it is of floats.
        transform: makes an item of a stream from a frame (rows x columns x 3, uint8); instead of
            ``like``. With neither, an item is a 1x3xHxW float32 tensor, 0 to 1, of the video's size.
        realtime: give frames at the video's own times, as a camera would.

    Raises:
        InputError: if there is no such file, it is no video, or frames do not fit. While
            iterating: if the file breaks off; every frame before that was given.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        like: Any = None,
        transform: Callable[[np.ndarray[Any, Any]], Any] | None = None,
        realtime: bool = False,
    ) -> None:
        self.path = Path(path)
        super().__init__(str(self.path), like, transform, realtime=realtime)
        if not self.path.is_file():
            raise InputError(f"{self.path}: there is no such file")
        with self._open(threading.Event()) as container:
            stream = _video_of(container, self.name)
            self.rate = float(stream.average_rate) if stream.average_rate else None
            self.length = stream.frames or None

    def _open(self, stop: threading.Event) -> InputContainer:
        import av

        try:
            return av.open(str(self.path), "r")
        except (av.FFmpegError, OSError) as error:
            raise InputError(f"{self.path} cannot be read as a video: {_words(error)}") from None

    def _decode(self, container: InputContainer, stream: VideoStream, stop: threading.Event) -> Generator[VideoFrame]:
        import av

        packets = frames = 0
        end, trouble = 0.0, ""
        try:
            for packet in container.demux(stream):
                packets += packet.size > 0
                if packet.pts is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                for frame in packet.decode():
                    frames += 1
                    yield frame
        except (av.FFmpegError, OSError) as error:
            trouble = _words(error)
            # What the decoder still holds was whole.
            for frame in _rest(stream):
                frames += 1
                yield frame
        trouble = trouble or _missing(container, stream, packets, end)
        if trouble:
            raise InputError(f"{self.path} breaks off after {frames} frames: {trouble}")


class Camera(_Frames):
    """The frames of a live source; only the newest is kept until it is taken.

    One thread decodes everything, because a decoder cannot leave frames out.

    Args:
        device: a device such as ``/dev/video0``, a URL such as ``rtsp://...`` or ``http://...``, or
            a named pipe that a program writes a video to.
        like: as for :class:`VideoFile`.
        transform: as for :class:`VideoFile`.
        options: FFmpeg's options for that source, such as ``{"video_size": "640x480"}``.

    Raises:
        InputError: while iterating, if the device cannot be opened or its stream fails.
    """

    def __init__(
        self,
        device: str | os.PathLike[str],
        *,
        like: Any = None,
        transform: Callable[[np.ndarray[Any, Any]], Any] | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        self.device = os.fspath(device)
        super().__init__(self.device, like, transform)
        self.live = True
        self._options = dict(options or {})
        if "://" not in self.device and not Path(self.device).exists():
            raise InputError(f"there is no camera {self.device}")

    def _open(self, stop: threading.Event) -> InputContainer:
        import av

        source: Any = self.device
        kind = "" if "://" in self.device else _kind(self.device)
        if kind == "pipe":
            source = PipeReader(self.device, stop)
        try:
            form = "v4l2" if kind == "device" else None
            made = av.open(source, "r", format=form, options=self._options, timeout=_TIMEOUT)
            return cast("InputContainer", made)
        except (av.FFmpegError, OSError) as error:
            raise InputError(f"the camera {self.device} cannot be opened: {_words(error)}") from None

    def _decode(self, container: InputContainer, stream: VideoStream, stop: threading.Event) -> Generator[VideoFrame]:
        import av
        from av.error import InvalidDataError

        frames = 0
        try:
            for packet in container.demux(stream):
                try:
                    decoded = packet.decode()
                except InvalidDataError:
                    continue  # joining a broadcast in its middle: nothing decodes before the first key frame
                for frame in decoded:
                    frames += 1
                    yield frame
        except (av.FFmpegError, OSError) as error:
            if not stop.is_set():
                raise InputError(f"the camera {self.device} failed after {frames} frames: {_words(error)}") from None


def _kind(path: str) -> str:
    mode = os.stat(path).st_mode
    return "device" if stat.S_ISCHR(mode) else "pipe" if stat.S_ISFIFO(mode) else "file"


def _video_of(container: InputContainer, name: str) -> VideoStream:
    if not container.streams.video:
        raise InputError(f"{name} has no video stream")
    return container.streams.video[0]


def _rest(stream: VideoStream) -> list[VideoFrame]:
    import av

    try:
        return stream.decode(None)
    except av.FFmpegError:
        return []


def _missing(container: InputContainer, stream: VideoStream, packets: int, end: float) -> str:
    """Why a file that ended without an error is not whole, or an empty text.

    FFmpeg takes a file cut off between two packets for a shorter one. Some formats say how many
    packets there are; others only how long the whole lasts, which is believed where the video is
    the only stream, and to within half a second.
    """
    if stream.frames > packets:
        return f"it says it has {stream.frames}"
    if not stream.frames and len(container.streams) == 1 and container.duration:
        whole, got = container.duration / 1e6, end - (container.start_time or 0) / 1e6
        if whole - got > 0.5:
            return f"it says it lasts {whole:.1f} s, but ends at {got:.1f} s"
    return ""


def _words(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error)
