"""An embedding that was killed midway is finished by the same command, and its file equals an undisturbed run's."""

import gzip
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
NUM_PROTEINS = 600  # of several parts


def start(python, checkpoint, fasta, output):
    return subprocess.Popen([python, str(ROOT / "tools" / "embed.py"), *map(str, (checkpoint, fasta, output))],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.table
def test_a_killed_run_loses_and_repeats_no_part(their_folders, python, tmp_path):
    with gzip.open(ROOT / "examples" / "proteins" / "small.fasta.gz", "rt") as file:
        (tmp_path / "in.fasta").write_text(">" + ">".join(file.read().split(">")[1:NUM_PROTEINS + 1]))
    checkpoint, fasta, output = their_folders / "esm2", tmp_path / "in.fasta", tmp_path / "out.npz"
    parts = tmp_path / "out.npz.parts"
    with start(python, checkpoint, fasta, output) as killed:
        while killed.poll() is None and not (parts / "0000001").exists():
            time.sleep(0.02)
        killed.send_signal(signal.SIGKILL)
        killed.communicate()  # nothing of it runs any longer
    assert killed.returncode == -signal.SIGKILL and not output.exists()
    num_done = len([path for path in parts.iterdir() if path.name.isdigit()])
    with start(python, checkpoint, fasta, output) as again:
        said = again.communicate()[0]
    assert again.returncode == 0 and f"going on: {num_done} of" in said
    with start(python, checkpoint, fasta, tmp_path / "whole.npz") as alone:
        assert alone.wait() == 0
    with np.load(output) as one, np.load(tmp_path / "whole.npz") as other:
        assert len(one.files) == NUM_PROTEINS and one.files == other.files
        assert all(np.array_equal(one[name], other[name]) for name in one.files)
