"""Tar archives: their files are read in order, each under its own name; damage is refused, and so is any loss."""

import gzip
import hashlib
import io
import json
import os
import tarfile

import pytest

from megatron.data.sources.source import expand
from tests.unit.protein_files import KINDS, PROTEINS, as_fasta, as_json, damaged, ids_of

MEMBERS = {"folder/a.fasta": as_fasta(PROTEINS[:2]), "b.json.gz": gzip.compress(as_json(PROTEINS[2:4])),
           "c.fa": as_fasta(PROTEINS[4:])}


def tar(members: dict[str, bytes], **options) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def names_of_members(path) -> list[str]:
    (source,) = expand([str(path)])
    return list(dict.fromkeys(block.source for block in source.blocks(("text",))))


@pytest.mark.parametrize("style", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_read_in_order_each_under_its_name(tmp_path, style):
    (tmp_path / "plain").write_bytes(as_fasta(PROTEINS))
    expected = ids_of(tmp_path, tmp_path / "plain")
    for data in (tar(MEMBERS, format=style), gzip.compress(tar(MEMBERS, format=style))):
        (tmp_path / "in").write_bytes(data)
        assert ids_of(tmp_path, tmp_path / "in") == expected
        stats = json.loads((tmp_path / "out.stats.json").read_text())["inputs"][0]
        assert stats["kinds"] == ["fasta", "json"]
        assert stats["sha256"] == hashlib.sha256(data).hexdigest()
    assert names_of_members(tmp_path / "in") == [f"{tmp_path}/in/{name}" for name in MEMBERS]


def test_a_tar_within_a_tar_and_a_long_name_are_read(tmp_path):
    deep = "x" * 90 + "/" + "y" * 90 + "/" + "z" * 90 + ".fa"
    (tmp_path / "in").write_bytes(tar({"in.tar": tar({deep: as_fasta(["MKV"])})}))
    assert names_of_members(tmp_path / "in") == [f"{tmp_path}/in/in.tar/{deep}"]


def test_skipping_bad_records_does_not_skip_a_later_member_that_is_something_else(tmp_path):
    data = tar({"a.fasta": as_fasta(["MKV"] * 9), "b.fasta": as_fasta(["M1"] * 9)})
    assert "b.fasta: line 2, column 2: '1' is not a residue (9 of 9 records" in damaged(tmp_path, data,
                                                                                        skip_bad_records=True)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_member_is_read(tmp_path, kind):
    (tmp_path / "in").write_bytes(tar({"member": KINDS[kind](["MKV"] * 9)}))
    assert len(ids_of(tmp_path, tmp_path / "in")) > 9 * 6


def test_folders_and_the_notes_of_macos_are_no_files(tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        folder = tarfile.TarInfo("data")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in (("data/._a.fa", b"\0\5\x16\7"), ("data/a.fa", as_fasta(["MK"]))):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    (tmp_path / "in").write_bytes(file.getvalue())
    assert names_of_members(tmp_path / "in") == [f"{tmp_path}/in/data/a.fa"]


def test_a_bad_member_is_named(tmp_path):
    assert "bad/c.fa: line 2, column 2: '1' is not" in damaged(tmp_path, tar({**MEMBERS, "c.fa": b">a\nM1\n"}))
    assert "bad/README: is text of another kind" in damaged(tmp_path, tar({**MEMBERS, "README": b"See Nature.\n"}))
    assert "bad/empty: is empty" in damaged(tmp_path, tar({"empty": b""}))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo("link.fa")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    assert "bad/link.fa: is a link, a device or sparse" in damaged(tmp_path, file.getvalue())


def test_a_tar_that_is_cut_short_or_damaged_is_refused_wherever(tmp_path):
    whole = tar(MEMBERS)
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for size in (*range(512, end + 512, 512 * 7), end - 512, end, end + 511):
        damaged(tmp_path, whole[:size])
    second = whole.index(b"b.json.gz")
    for place in (second, second + 150):
        assert "tar" in damaged(tmp_path, whole[:place] + b"\xff\xff" + whole[place + 2:])


def test_archives_in_a_row_are_refused_as_all_but_the_first_would_be_lost(tmp_path):
    assert "several in a row" in damaged(tmp_path, tar(MEMBERS) + tar(MEMBERS))


def test_nothing_is_unpacked_beside_the_archive(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").write_bytes(tar({"../escape.fa": as_fasta(["MK"]), "/abs.fa": as_fasta(["MK"])}))
    before = os.listdir(tmp_path.parent)
    assert names_of_members(tmp_path / "in") == [f"{tmp_path}/in/../escape.fa", f"{tmp_path}/in//abs.fa"]
    assert os.listdir(tmp_path.parent) == before
    assert os.listdir(tmp_path) == ["in"]
