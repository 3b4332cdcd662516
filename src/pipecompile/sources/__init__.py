"""Where samples come from: video files, cameras, image folders, arrays, random numbers.

    with VideoFile("clip.mp4", like=pipe) as frames:
        for result in pipe.stream(frames):
            ...

Every source yields :class:`~pipecompile.ir.sample.Sample` objects with a time stamp, may be
iterated again, and says by ``live`` whether it goes on without waiting for the reader. ``Replay``
makes batches of pairs to learn from.
"""

from pipecompile.sources.arrays import NumpyFile, Random
from pipecompile.sources.images import ImageFolder
from pipecompile.sources.replay import Replay
from pipecompile.sources.source import Source
from pipecompile.sources.video import Camera, VideoFile

__all__ = ["Camera", "ImageFolder", "NumpyFile", "Random", "Replay", "Source", "VideoFile"]
