"""``pipecompile run``: every source and sink, failures on either side, and a clean end."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pipecompile
from commands import MODEL, command, done
from media import cut, frames, write_video

Run = Callable[..., tuple[int, str, str]]
INLINE = ("--inline",)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled folders: ``net`` (2x12 -> 2x5), ``picture`` (1x3x16x16) and ``lookup`` (ids of 0 to 3)."""
    place = tmp_path_factory.mktemp("saved")
    for name, example in [
        ("make", torch.zeros(2, 12)),
        ("Picture", torch.zeros(1, 3, 16, 16)),
        ("Lookup", torch.zeros(1, 3, dtype=torch.int64)),
    ]:
        with pipecompile.compile(models(name), (example,), executor="inline", profile_seconds=0.05) as pipe:
            pipe.save(place / name)
    return place


def models(name: str) -> Any:
    namespace: dict[str, Any] = {}
    exec(MODEL, namespace)
    return namespace[name]().eval()


def test_json_lines_hold_number_time_and_the_largest_values(saved: Path, folder: Path, run: Run) -> None:
    np.save(folder / "x.npy", np.random.default_rng(0).standard_normal((4, 2, 12)).astype(np.float32))
    words = ("run", str(saved / "make"), "--input", "x.npy", "--rate", "10", *INLINE)
    status, out, err = run(*words, "-o", "out.jsonl", "--top", "2")
    assert status == 0, err
    assert "4 samples in" in out
    assert "wrote 4 results to out.jsonl" in out
    lines = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert [line["sample"] for line in lines] == [0, 1, 2, 3]
    assert [line["pts"] for line in lines] == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert all(line["latency_ms"] > 0 for line in lines)
    with torch.no_grad():
        expected = models("make")(torch.from_numpy(np.load(folder / "x.npy"))[1])
    top = lines[1]["outputs"]["output"]
    assert top["shape"] == [2, 5]
    place, value = top["top"][0]
    assert value == float(expected.max())
    assert place == [int(i) for i in np.unravel_index(int(expected.argmax()), (2, 5))]
    status, out, err = run(*words, "-o", "-", "--top", "0", "--count", "2")
    assert status == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert len(lines) == 2
    assert np.allclose(lines[1]["outputs"]["output"]["values"], expected.flatten())
    assert "2 samples in" in err, "what is said otherwise does not mix with the results"


def test_nested_results_keep_their_names_and_nan_is_null(saved: Path, folder: Path, run: Run) -> None:
    np.save(folder / "ids.npy", np.array([[[0, 1, 3]], [[2, 2, 2]]]))
    status, _, err = run("run", str(saved / "Lookup"), "--input", "ids.npy", "-o", "out.jsonl", "--top", "1", *INLINE)
    assert status == 0, err
    line = json.loads((folder / "out.jsonl").read_text().splitlines()[0])
    assert set(line["outputs"]) == {"scores", "twice.0"}
    assert line["outputs"]["twice.0"] == {"shape": [1, 3], "top": [[2, 6.0]]}, "ones of a batch say nothing"
    np.save(folder / "nan.npy", np.full((1, 2, 12), np.nan, np.float32))
    status, out, _ = run("run", str(saved / "make"), "--input", "nan.npy", "-o", "-", "--top", "1", *INLINE)
    assert json.loads(out)["outputs"]["output"]["top"][0][1] is None


def test_video_pictures_and_a_named_pipe_give_the_model_s_results(saved: Path, folder: Path, run: Run) -> None:
    video = write_video(folder / "clip.mkv", 8, codec="ffv1")
    (folder / "pictures").mkdir()
    for i, pixels in enumerate(frames(8)):
        Image.fromarray(pixels).save(folder / "pictures" / f"{i}.png")
    for source in ("clip.mkv", "pictures"):
        status, out, err = run("run", str(saved / "Picture"), "--input", source, "-o", "out.npy", *INLINE)
        assert (status, "8 samples in" in out) == (0, True), err
        got = torch.from_numpy(np.load(folder / "out.npy"))
        with pipecompile.load(saved / "Picture", executor="inline") as pipe:
            kind = pipecompile.sources.VideoFile if source == "clip.mkv" else pipecompile.sources.ImageFolder
            expected = [models("Picture")(*sample.value) for sample in kind(folder / source, like=pipe)]
        assert torch.equal(got, torch.stack(expected).detach())
    os.mkfifo(folder / "camera")

    def feed() -> None:
        with (folder / "camera").open("wb") as pipe_:
            pipe_.write(video.read_bytes())

    feeding = threading.Thread(target=feed)
    feeding.start()
    status, out, err = run("run", str(saved / "Picture"), "--input", "camera:camera", *INLINE)
    feeding.join(30)
    assert status == 0, err
    assert re.search(r"^\d+ samples? in", out, re.MULTILINE)  # a live source that is behind drops some


def test_a_file_in_real_time_drops_what_comes_too_fast_and_says_so(saved: Path, folder: Path, run: Run) -> None:
    np.save(folder / "x.npy", np.zeros((400, 2, 12), np.float32))
    words = ("run", str(saved / "make"), "--input", "x.npy", "--realtime", "--rate", "1e6", "-o", "-", "--top", "1")
    status, out, err = run(*words, "--max-in-flight", "1", *INLINE)
    assert status == 0, err
    samples = [json.loads(line)["sample"] for line in out.splitlines()]
    assert samples == sorted(set(samples)), "order kept, no sample twice"
    dropped = int(err.partition(" dropped")[0].rpartition(" ")[2]) if " dropped" in err else 0
    skipped = int(err.partition(" more frames passed")[0].rpartition("\n")[2]) if "more frames" in err else 0
    assert len(samples) + dropped + skipped == 400, "every sample is accounted for"
    status, out, err = run(*words, "--on-overload", "block", *INLINE)
    assert " dropped" not in err


def test_a_sample_that_fails_is_named_and_the_next_goes_on(saved: Path, folder: Path, run: Run) -> None:
    np.save(folder / "ids.npy", np.array([[[0, 1, 2]], [[0, 9, 0]], [[3, 3, 3]]]))
    status, out, err = run("run", str(saved / "Lookup"), "--input", "ids.npy", "-o", "out.jsonl", *INLINE)
    assert status == 1
    assert "error: stage 0" in err
    assert "at sample 1 in layer embed" in err
    assert "3 submitted: 2 delivered, 0 dropped, 1 failed" in out
    lines = (folder / "out.jsonl").read_text().splitlines()
    assert [json.loads(line)["sample"] for line in lines] == [0, 2]


def test_a_truncated_video_gives_what_it_has_then_the_error(saved: Path, folder: Path, run: Run) -> None:
    cut(write_video(folder / "clip.mkv", 50), 0.6)
    status, out, err = run("run", str(saved / "Picture"), "--input", "cut_clip.mkv", "-o", "out.npy", *INLINE)
    assert status == 1
    count = len(np.load(folder / "out.npy"))
    assert 0 < count < 50
    assert f"error: cut_clip.mkv breaks off after {count} frames" in err
    assert f"wrote {count} results to out.npy" in out


def test_an_output_that_cannot_be_written_is_refused_first(saved: Path, folder: Path, run: Run) -> None:
    for output, said in [
        ("nets.py/out.npy", "cannot write nets.py/out.npy: Not a directory"),
        ("absent/out.jsonl", "cannot write absent/out.jsonl: No such file or directory"),
        ("out.txt", "results can be written to a .npy or .jsonl file"),
    ]:
        status, _, err = run("run", "no_such.pipe", "--input", "random:3", "-o", output)
        assert (status, said in err) == (1, True), err
    status, _, err = run("run", "no_such.pipe", "--input", "random:3", "--trace", "nets.py/trace.json")
    assert "cannot write nets.py/trace.json" in err


def test_what_is_there_stays_until_the_first_result(saved: Path, folder: Path, run: Run) -> None:
    (folder / "old.jsonl").write_text("old results\n")
    assert run("run", "no_such.pipe", "--input", "random:3", "-o", "old.jsonl")[0] == 1
    assert (folder / "old.jsonl").read_text() == "old results\n"
    assert run("run", "no_such.pipe", "--input", "random:3", "-o", "new.jsonl")[0] == 1
    assert not (folder / "new.jsonl").exists()
    assert run("run", str(saved / "make"), "--input", "random:3", "-o", "old.jsonl", *INLINE)[0] == 0
    assert len((folder / "old.jsonl").read_text().splitlines()) == 3


def test_a_full_disk_is_one_error_and_whole_results_stay(saved: Path, folder: Path, run: Run) -> None:
    (folder / "full.jsonl").symlink_to("/dev/full")
    status, _, err = run("run", str(saved / "make"), "--input", "random:5", "-o", "full.jsonl", *INLINE)
    assert status == 1
    assert "error: cannot write full.jsonl: No space left on device; the 0 results before are in it" in err
    assert err.count("error:") == 1

    for words in (
        ["run", str(saved / "make"), "--input", "random:5", "-o", "-", "--inline"],
        ["report", str(saved / "make")],
    ):
        with open("/dev/full", "w") as full:
            line = [sys.executable, "-m", "pipecompile.cli", *words]
            found = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
        assert (found.returncode, found.stderr) == (
            1,
            "error: cannot write to standard output: No space left on device\n",
        )

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    words = ["run", str(saved / "make"), "--input", "random:50", "-o", "o.npy", "--inline"]
    result = subprocess.run(
        [sys.executable, "-m", "pipecompile.cli", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        preexec_fn=small,
    )
    assert result.returncode == 1
    rows = len(np.load(folder / "o.npy"))
    assert rows == (1000 - 128) // 40, "as many as fit, each whole"
    assert f"error: cannot write o.npy: File too large; the {rows} results before are in it" in result.stderr
    assert f"wrote {rows} results to o.npy" in result.stdout


def test_ctrl_c_ends_with_the_summary_and_leaves_nobody(saved: Path, folder: Path) -> None:
    words = ["run", str(saved / "make"), "--input", "random:100000000", "-o", "out.jsonl", "--trace", "trace.json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipecompile.cli", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        limit = time.monotonic() + 60
        while not ((folder / "out.jsonl").exists() and (folder / "out.jsonl").stat().st_size):
            assert time.monotonic() < limit
            assert process.poll() is None, process.stderr
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to everybody
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "samples/s after the first, on 2 stages" in out
    assert "Traceback" not in err
    assert err.strip() == "error: interrupted"
    lines = (folder / "out.jsonl").read_text().splitlines()
    assert f"{len(lines)} samples in" in out
    assert f"wrote {len(lines)} results" in out
    assert json.loads((folder / "trace.json").read_text())["traceEvents"]
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_a_live_line_on_a_terminal_and_none_in_a_pipe(saved: Path, folder: Path) -> None:
    words = [sys.executable, "-m", "pipecompile.cli", "run", str(saved / "make"), "--input", "random:2000", "--inline"]
    words += ["-o", "-", "--top", "1"]
    master, slave = pty.openpty()
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=slave, text=True)
    os.close(slave)
    assert process.stdout is not None
    lines: list[str] = []
    reading = threading.Thread(target=lines.extend, args=(process.stdout,))
    reading.start()
    seen = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:  # the other end has closed
            break
        if not chunk:
            break
        seen += chunk
    reading.join(60)
    process.stdout.close()
    os.close(master)
    assert process.wait(60) == 0
    assert b"latency" in seen or b"waiting for the first results" in seen
    assert b"2000 samples in" in seen
    assert len(lines) == 2000, "the line on the terminal takes nothing from standard output"
    assert json.loads(lines[-1])["sample"] == 1999
    result = command(folder, *words[3:-4])
    assert done(result)
    assert result.stderr == ""


def test_the_head_of_the_lines_is_enough(saved: Path, folder: Path) -> None:
    line = f"{sys.executable} -m pipecompile.cli run {saved / 'make'} --input random:3000 --inline -o - | head -n 2"
    result = subprocess.run(line, shell=True, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert len(result.stdout.splitlines()) == 2
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--input", "camera:"], "write camera:/dev/video0"),
        (["--input", "camera:/dev/video99"], "there is no camera /dev/video99"),
        (["--input", "random:3", "--rate", "0"], "rate=0.0: give the number of samples a second"),
        (["--input", "clip.mp4", "--rate", "3"], "--rate is for sources without times of their own"),
        (["--input", "camera:/dev/null", "--realtime"], "a camera is live anyway"),
        (["--input", "random:3", "--max-in-flight", "0"], "max_in_flight=0"),
        (["--input", "nothing.mp4"], "there is no such file or folder"),
    ],
)
def test_words_that_make_no_sense(saved: Path, run: Run, words: list[str], said: str) -> None:
    status, _, err = run("run", str(saved / "Picture"), *words, *INLINE)
    assert (status, said in err) == (1, True), err
    assert "Traceback" not in err
