"""After preprocessing was killed, a rerun gives an undisturbed run's bytes; no partial file ever looks complete."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.data.corpus.indexed import open_indexed
from megatron.data.preprocess.flags import parse_arguments
from megatron.data.preprocess.run import preprocess

ROOT = Path(__file__).resolve().parents[2]
# The program, but it kills itself where it is about to give a file the name NAME for the TIMES_LEFT-th time.
DYING = f"""
import os, pathlib, runpy, signal, sys
name, times_left = sys.argv[1], int(sys.argv[2])
replace = os.replace

def replace_or_die(old, new):
    global times_left
    times_left -= os.path.basename(new) == name
    if not times_left:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(old, new)

os.replace = replace_or_die
pathlib.Path.replace = lambda path, new: os.replace(path, new)  # Python 3.10's has a copy of the other
del sys.argv[1:3]
runpy.run_path({str(ROOT / "tools" / "preprocess_data.py")!r}, run_name="__main__")
"""
# What gets its name at the moment of the kill and for which time, the number of workers, and how many shards of three
# the rerun goes on behind: none once the first of the files is in its place.
KILLS = [("progress.json", 1, 1, 0), ("progress.json", 2, 2, 1), ("out_text_document.bin", 1, 1, 2),
         ("out_text_document.idx", 1, 1, 0), ("out.stats.json", 1, 1, 0)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 6 MB of proteins: three blocks."""
    generator = random.Random(3)
    pool = ["".join(generator.choices("ACDEFGHIKLMNPQRSTVWY", k=generator.randrange(30, 900))) for _ in range(300)]
    path = tmp_path_factory.mktemp("corpus") / "in.json"
    path.write_text("".join(json.dumps({"id": f"P{n}", "text": f"MK{generator.choice(pool)}"}) + "\n"
                            for n in range(12_000)))
    return path


@pytest.fixture(scope="module")
def expected(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run writes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    preprocess(parse_arguments(flags(corpus, folder)))
    return files(folder)


def flags(corpus: Path, folder: Path, num_workers: int = 1) -> list[str]:
    return ["--input", str(corpus), "--output-prefix", str(folder / "out"), "--workers", str(num_workers), "--shards",
            "3", "--dedup", "exact", "--names"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def same_but_for_paths(found: dict[str, bytes], expected: dict[str, bytes]) -> bool:
    stats = [json.loads(one["out.stats.json"])["outputs"]["text"] for one in (found, expected)]
    for one in stats:
        one["files"] = [file["sha256"] for file in one["files"]]
    names = ("out_text_document.bin", "out_text_document.idx", "out_text_document.names")
    return found.keys() == expected.keys() and stats[0] == stats[1] and all(found[n] == expected[n] for n in names)


def run_again(corpus: Path, folder: Path, expected: dict[str, bytes]) -> None:
    """Assert what holds behind any kill, before and after the same command in this process."""
    if (folder / "out_text_document.idx").exists():
        open_indexed(str(folder / "out_text_document"))
        for name in ("out_text_document.bin", "out_text_document.names"):
            assert (folder / name).read_bytes() == expected[name]
    has_ended = ["--overwrite"] if (folder / "out.stats.json").exists() else []
    preprocess(parse_arguments([*flags(corpus, folder), *has_ended]))
    assert same_but_for_paths(files(folder), expected)
    assert not list(folder.glob("*.partial"))


@pytest.mark.parametrize(("name", "time_of_it", "num_workers", "num_shards"), KILLS)
def test_a_run_killed_while_files_get_their_names_is_never_taken_for_whole_and_goes_on_behind_its_last_shard(
        name, time_of_it, num_workers, num_shards, corpus, expected, tmp_path, capsys):
    killed = subprocess.run([sys.executable, "-c", DYING, name, str(time_of_it),
                             *flags(corpus, tmp_path, num_workers)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run_again(corpus, tmp_path, expected)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("going on")]
    assert said == ([f"going on behind shard {num_shards} of 3"] if num_shards else [])


@pytest.mark.parametrize(("seed", "num_workers"), [(0, 1), (1, 2)])
def test_a_run_killed_at_any_moment_can_be_run_again(seed, num_workers, corpus, expected, tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *flags(corpus, tmp_path, num_workers)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while run.poll() is None and not list(tmp_path.iterdir()):
            time.sleep(0.005)
        time.sleep(random.Random(seed).uniform(0, 0.4))  # where it then is is the machine's matter; it may have ended
        run.kill()
    run_again(corpus, tmp_path, expected)
