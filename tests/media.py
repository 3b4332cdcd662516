"""Real pictures and real video files for tests: a photograph seen by a moving camera."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from skimage.data import astronaut

SIDE = 64


def frames(count: int) -> Iterator[np.ndarray[Any, Any]]:
    """``count`` crops of a photograph, 64 x 64 x 3 bytes, each a little further along."""
    picture = np.asarray(astronaut())
    for i in range(count):
        at = (4 * i) % 400
        yield np.ascontiguousarray(picture[at : at + SIDE, at // 2 : at // 2 + SIDE])


def write_video(path: Path, count: int, *, codec: str = "mpeg4", rate: int = 25, **options: str) -> Path:
    """A video of those frames in the container that the suffix of ``path`` names."""
    with av.open(str(path), "w", options=options) as container:
        stream: Any = container.add_stream(codec, rate=rate)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        stream.codec_context.gop_size = 5
        for pixels in frames(count):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=stream.pix_fmt)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def cut(path: Path, share: float) -> Path:
    """The first ``share`` of a file, as another file beside it."""
    data = path.read_bytes()
    made = path.with_name(f"cut_{path.name}")
    made.write_bytes(data[: int(len(data) * share)])
    return made
