"""Mistakes of the user's give one clear line, exit status 2, and no half-written file under a final name."""

import shutil
import subprocess
from pathlib import Path

import pytest

from pretrain_tape import main
from tests.golden.training import ROOT, TINY, run_on_ranks, write_corpus

RUN = [*TINY, "--train-iters", "12"]


@pytest.fixture
def damaged(corpus, tmp_path):
    for suffix in (".bin", ".idx"):
        shutil.copy(corpus + suffix, tmp_path / f"copy{suffix}")
    return tmp_path / "copy"


def error_of(capsys, *flags):
    assert main([*RUN, *map(str, flags)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


def test_no_data(capsys):
    assert "--data-path is missing" in error_of(capsys)


def test_data_that_is_not_there(capsys, tmp_path):
    assert str(tmp_path / "nothing.idx") in error_of(capsys, "--data-path", tmp_path / "nothing")


def test_a_truncated_bin(capsys, damaged):
    path = damaged.with_suffix(".bin")
    path.write_bytes(path.read_bytes()[:-10])
    assert str(path) in error_of(capsys, "--data-path", damaged)


def test_an_index_of_another_dataset(capsys, damaged, tmp_path):
    (tmp_path / "other").mkdir()
    other = write_corpus(tmp_path / "other", num_proteins=299)
    shutil.copy(other + ".idx", damaged.with_suffix(".idx"))
    assert str(damaged) in error_of(capsys, "--data-path", damaged)


@pytest.mark.parametrize("content", [b"", b"rubbish", b"MMIDIDX\x00\x00" + b"\xff" * 40])
def test_a_bad_header(capsys, damaged, content):
    damaged.with_suffix(".idx").write_bytes(content)
    assert f"{damaged}.idx" in error_of(capsys, "--data-path", damaged)


def test_a_split_that_leaves_nothing_to_train_on(capsys, corpus):
    assert "--split 0,50,50" in error_of(capsys, "--data-path", corpus, "--split", "0,50,50")


def test_a_global_batch_that_does_not_divide(capsys, corpus):
    assert "--global-batch-size 5 is not divisible" in error_of(capsys, "--data-path", corpus, "--global-batch-size", 5)


def test_a_vocabulary_that_is_not_there(capsys, corpus, tmp_path):
    assert str(tmp_path / "v.txt") in error_of(capsys, "--data-path", corpus, "--vocab-file", tmp_path / "v.txt")


def test_a_checkpoint_of_another_model(capsys, corpus, tmp_path):
    assert main([*RUN, "--data-path", corpus, "--save", str(tmp_path), "--train-iters", "2"]) == 0
    capsys.readouterr()
    flags = ["--data-path", corpus, "--load", tmp_path, "--train-iters", 2]
    assert "--num-attention-heads is 4" in error_of(capsys, *flags, "--num-attention-heads", 4)
    assert "--ffn-hidden-size is 64" in error_of(capsys, *flags, "--ffn-hidden-size", 64)
    assert "--override-lr-scheduler" in error_of(capsys, *flags, "--lr", 1)


def test_a_folder_that_may_not_be_looked_into(capsys, corpus, tmp_path, monkeypatch):
    is_file = Path.is_file

    def refused(path, **options):
        if path.is_relative_to(tmp_path / "theirs"):
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path, **options)

    monkeypatch.setattr(Path, "is_file", refused)
    said = error_of(capsys, "--data-path", corpus, "--load", tmp_path / "theirs" / "run")
    assert "Permission denied" in said and "theirs" in said


def test_a_run_that_another_would_overwrite(capsys, corpus, tmp_path):
    assert main([*RUN, "--data-path", corpus, "--save", str(tmp_path), "--train-iters", "2"]) == 0
    capsys.readouterr()
    before = (tmp_path / "metrics.jsonl").read_text()
    flags = ["--data-path", corpus, "--save", tmp_path, "--train-iters", 2]
    assert "already holds a run" in error_of(capsys, *flags)
    assert "without --finetune" in error_of(capsys, *flags, "--load", tmp_path, "--finetune")
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_checkpoint_without_optimizer(capsys, corpus, tmp_path):
    flags = ["--data-path", corpus, "--train-iters", "2", "--save", str(tmp_path), "--load", str(tmp_path)]
    assert main([*RUN, *flags, "--no-save-optim", "--exit-interval", "1"]) == 0
    capsys.readouterr()
    assert "--no-load-optim" in error_of(capsys, *flags)
    assert main([*RUN, *flags, "--no-load-optim"]) == 0


FULL_DISK = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = 40_000  # bytes a file: less than the model, more than what comes before it
sys.path.insert(0, {str(ROOT)!r})
import pretrain_tape
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
sys.exit(pretrain_tape.main(sys.argv[1:]))
"""


def test_a_full_disk_while_saving_leaves_the_last_good_checkpoint(corpus, tmp_path, python):
    flags = [*RUN, "--data-path", corpus, "--save", str(tmp_path), "--load", str(tmp_path)]
    assert main([*flags, "--exit-interval", "4"]) == 0
    program = tmp_path / "full_disk_pretrain_tape.py"
    program.write_text(FULL_DISK)
    result = subprocess.run([python, program, *flags], text=True, capture_output=True)
    assert result.returncode == 4, result.stdout + result.stderr
    assert result.stderr.startswith(f"error: could not save {tmp_path}/iter_00000")
    assert "The last good checkpoint is untouched; raise the limit on the size of files (ulimit -f)" in result.stderr
    assert sorted(path.name for path in Path(tmp_path).glob("*iter_*")) == ["iter_0000004"]
    assert main(flags) == 0


def test_all_ranks_end_on_a_mistake_of_the_user(tmp_path):
    assert run_on_ranks(*RUN, "--data-path", tmp_path / "nothing", ranks=2) == [2, 2]
