"""Files appear complete under their names; a path that is not a plain file is written to, never replaced."""

import os
import threading
from pathlib import Path

import pytest

from megatron.files import leaving_no_empty, new_folder, replacing, write_text


def test_an_error_leaves_the_old_content_and_nothing_else(tmp_path):
    write_text(tmp_path / "a", "old")
    with pytest.raises(RuntimeError), replacing(tmp_path / "a") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a", "old")]


@pytest.mark.parametrize(("made", "left"), [
    ("a/b/c", ["a"]), ("a/b", ["a"]), ("a/b/c/d", ["a", "a/b", "a/b/c", "a/b/c/d"])])
def test_empty_folders_of_a_failure_go_and_what_was_there_or_holds_something_stays(made, left, tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(RuntimeError), leaving_no_empty(tmp_path / "a" / "b" / "c"):
        (tmp_path / made).mkdir(parents=True)
        raise RuntimeError
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == left


@pytest.mark.parametrize("begin", [replacing, new_folder])
def test_an_error_of_the_disk_names_what_was_to_be_written(tmp_path, begin):
    for error in (OSError(28, "No space left on device"), None):
        with pytest.raises(OSError) as raised, begin(tmp_path / "a") as temporary:
            if error:
                raise error
            (temporary / "no folder" / "b").write_text("")
        assert raised.value.filename == str(tmp_path / "a") and os.listdir(tmp_path) == []


def test_an_error_of_another_file_is_its_own(tmp_path):
    with pytest.raises(FileNotFoundError) as raised, replacing(tmp_path / "a"):
        (tmp_path / "b").read_text()
    assert raised.value.filename == str(tmp_path / "b")


def test_a_pipe_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=write_text, args=(tmp_path / "pipe", "text"), daemon=True)
    writer.start()
    assert (tmp_path / "pipe").read_text() == "text"
    writer.join()
    assert (tmp_path / "pipe").is_fifo() and len(list(tmp_path.iterdir())) == 1


def test_a_device_behind_a_link_is_written_to(tmp_path):
    (tmp_path / "null").symlink_to("/dev/null")
    write_text(tmp_path / "null", "text")
    assert Path("/dev/null").is_char_device() and os.listdir(tmp_path) == ["null"]
    assert (tmp_path / "null").is_symlink()


@pytest.mark.parametrize("is_there", [False, True])
def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path, is_there):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    if is_there:
        (tmp_path / "disk" / "file").write_text("old")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "file").read_text() == "new"
    assert os.listdir(tmp_path / "disk") == ["file"]
