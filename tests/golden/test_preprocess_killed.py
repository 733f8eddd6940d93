"""Preprocessing killed outright, ten times: a rerun gives the undisturbed bytes, and nothing half is ever whole."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.data.corpus.indexed import open_indexed

ROOT = Path(__file__).resolve().parents[2]
NUM_KILLS = 10


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 12 MB of proteins: six blocks."""
    generator = random.Random(3)
    pool = ["".join(generator.choices("ACDEFGHIKLMNPQRSTVWY", k=generator.randrange(30, 900))) for _ in range(300)]
    path = tmp_path_factory.mktemp("corpus") / "in.json"
    path.write_text("".join(json.dumps({"id": f"P{n}", "text": f"MK{generator.choice(pool)}"}) + "\n"
                            for n in range(24_000)))
    return path


def start(corpus: Path, folder: Path, num_workers: int) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(corpus),
               "--output-prefix", str(folder / "out"), "--workers", str(num_workers), "--shards", "6",
               "--dedup", "exact", "--names"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def same_but_for_paths(found: dict[str, bytes], expected: dict[str, bytes]) -> bool:
    stats = [json.loads(one["out.stats.json"])["outputs"]["text"] for one in (found, expected)]
    for one in stats:
        one["files"] = [file["sha256"] for file in one["files"]]
    names = ("out_text_document.bin", "out_text_document.idx", "out_text_document.names")
    return found.keys() == expected.keys() and stats[0] == stats[1] and all(found[n] == expected[n] for n in names)


@pytest.mark.timeout(300)
def test_a_killed_run_is_never_taken_for_whole_and_can_be_run_again(corpus, tmp_path):
    begun = time.monotonic()
    assert start(corpus, tmp_path, 1).wait() == 0
    duration_s = time.monotonic() - begun
    expected = files(tmp_path)
    generator = random.Random()
    num_resumed = 0
    for number in range(NUM_KILLS):
        folder = tmp_path / f"kill-{number}"
        folder.mkdir()
        run = start(corpus, folder, 1 if number % 5 else 2)
        time.sleep(generator.uniform(0.3, 1.0) * duration_s)
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        if (folder / "out_text_document.idx").exists():
            open_indexed(str(folder / "out_text_document"))
            for name in ("out_text_document.bin", "out_text_document.names"):
                assert (folder / name).read_bytes() == expected[name]
        rerun = start(corpus, folder, 1)
        _, errors = rerun.communicate()
        assert rerun.returncode == 0, errors
        num_resumed += b"going on behind shard" in errors
        assert same_but_for_paths(files(folder), expected)
        assert not list(folder.glob("*.partial"))
    assert num_resumed > 0
