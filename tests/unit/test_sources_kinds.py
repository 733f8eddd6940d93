"""Detection of file formats: each unsupported one is refused by its name, and protein files never are."""

import gzip
import re

import pytest

from megatron.data.sources import streams
from megatron.data.sources.kinds import BINARY_KINDS, TEXT_KINDS
from tests.unit.protein_files import damaged, ids_of

REFUSED = {
    "packed twice": gzip.compress(gzip.compress(b">a\nMK\n")),
    "packed with xz": b"\xfd7zXZ\x00\x00\x04\x00\x00\x00\x00",
    "packed with bzip2": b"BZh91AY&SY\x00\x00\x00\x00",
    "packed with zip (or an office document)": b"PK\x03\x04\n\x00\x00\x00\x00\x00",
    "packed with 7z": b"7z\xbc\xaf'\x1c",
    "PDF": b"%PDF-1.7\n%\xe2\xe3",
    "HDF5": b"\x89HDF\r\n\x1a\n",
    "SQLite": b"SQLite format 3\x00\x10\x00",
    "a NumPy array": b"\x93NUMPY\x01\x00v\x00{'descr': '<U9'}",
    "an indexed dataset already": b"MMIDIDX\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x08",
    "UTF-16 text": b"\xff\xfe>\x00a\x00\n\x00",
    "a JSON array of no objects": b'[\n "MK",\n "V"\n]\n',
    "JSON over several lines": b'{\n  "text": "MK"\n}\n',
    "PIR": b">P1;CRAB_ANAPL\nALPHA CRYSTALLIN - DUCK\nMDITIHNPLI*\n",
    "a Stockholm alignment": b"# STOCKHOLM 1.0\n\nQ1/1-5   MKV..LLA\n//\n",
    "a NEXUS alignment": b"#NEXUS\nBEGIN DATA;\n",
    "GFF or VCF": b"##gff-version 3\nctg\t.\tgene\t1\t9\n",
    "UniProt or EMBL text": b"ID   001R_FRG3G   Reviewed;  256 AA.\n",
    "GenBank": b"LOCUS       NP_000537   393 aa\n",
    "a Clustal alignment": b"CLUSTAL O(1.2.4) multiple\n\na  MKV\nb  MKL\n",
    "a PHYLIP alignment": b" 2 5\nalpha     MKVLL\nbeta      MKVLA\n",
    "an MSF alignment": b"!!AA_MULTIPLE_ALIGNMENT 1.0\n",
    "a HMMER profile": b"HMMER3/f [3.1b2]\nNAME  PF1\n",
    "PDB": b"HEADER    PLANT PROTEIN                           30-APR-81   1CRN\nTITLE     WATER STRUCTURE\n",
    "mmCIF": b"data_1CRN\n#\n_entry.id 1CRN\n",
    "FASTQ": b"@read1\nACGT\n+\nIIII\n",
    "SAM": b"@HD\tVN:1.6\n",
    "an HTML page": b"<!DOCTYPE html>\n<html><head><title>404</title></head></html>\n",
    "UniProt XML": b'<?xml version="1.0"?>\n<uniprot><entry>MKV</entry></uniprot>\n',
    "XML": b"<BlastOutput>\n",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",
    "binary data of a kind not known here": b"\x7fELF\x02\x01\x01\x00\x00\x00",
    "text of another kind": b"Not Found\n",
}


def test_every_kind_that_is_refused_is_tried_here():
    assert REFUSED.keys() == {kind.name for kind in (*BINARY_KINDS, *TEXT_KINDS) if kind.read is None}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_by_its_name_and_with_a_remedy(tmp_path, monkeypatch, name):
    for chunk_bytes in (1 << 20, 1):
        monkeypatch.setattr(streams, "_CHUNK_BYTES", chunk_bytes)
        for options in ({}, {"skip_bad_records": True}):
            line = damaged(tmp_path, REFUSED[name], **options)
            first = REFUSED[name].strip(b" \n").splitlines()[0]
            is_text = all(byte == 9 or 32 <= byte < 127 for byte in first)
            assert f"bad: is {name}{' (it begins ' if is_text else '; '}" in line
            assert line.isprintable() and not line.endswith("; ")


@pytest.mark.parametrize("name", [name for name in REFUSED if name in {kind.name for kind in TEXT_KINDS}])
def test_blank_lines_and_a_byte_order_mark_hide_no_kind(tmp_path, name):
    data = REFUSED[name].replace(b"\n", b"\r\n")
    assert re.search(f"bad: is {name}( .it begins |; )", damaged(tmp_path, b"\xef\xbb\xbf\r\n \n" + data))


@pytest.mark.parametrize("text", [
    "Not Found", "404: Not Found", "Forbidden", "Access Denied", "file not found", "permission denied",
    "NOT FOUND ON THIS SERVER", "Sorry, this page has moved",
    "The sequences of this study will be shared.\nAsk the authors for them\n",
    "\n".join(["water", "house", "about", "could", "would", "brown", "jumbo", "found"] * 10),
    "sp1 MKVLLAAGIV\nsp2 MKVLAAGIVA", "crambin TTCCPSIVAR\nhirudin VVYTDCTESG", "P1 | MKV", "MKV 0.91\nMKL 0.12"])
def test_words_are_no_proteins(tmp_path, text):
    assert "bad: is text of another kind" in damaged(tmp_path, text.encode())


@pytest.mark.parametrize(("text", "num_proteins"), [
    ("mkvllaagiv\nacdefghikl\n", 2), ("M K V\nA C D E\n", 2), ("M\tK\tV\nA\tC\tD\n", 2), ("MKV*\nMK*\n", 2),
    ("MKVLLAAGIV ACDEFGHIKL MN\nMKVLLAAGIV\n", 2), ("MK--V.L\n-MKvll..V-\nM-Kvll-V\n", 3), ("\n\n  MKV\r\n\r\nMKL", 2),
    ("MKV", 1), ("A" * 100_000, 1), ("MKVLLA GGGGSGGGGS ACDEFGH\n", 1), ("XBZUOJ\nMKV\nGGGG\n", 3),
    ("MDRAFT\nTITLE\nID\n", 3), ("SEQVENCES\nTEXTS\nPRIMARYSEQ\n", 3)])
def test_proteins_in_any_spelling_are_one_a_line(tmp_path, monkeypatch, text, num_proteins):
    monkeypatch.setattr(streams, "_CHUNK_BYTES", 5)
    (tmp_path / "in").write_text(text, newline="")
    found = ids_of(tmp_path, tmp_path / "in")
    assert int.from_bytes(found[found.index(b"MMIDIDX") + 18:][:8], "little") == num_proteins


def test_a_bad_line_among_proteins_is_named_and_not_the_whole_file(tmp_path):
    line = damaged(tmp_path, b"MKV\n" * 30_000 + b"MK\0V\n")
    assert "line 30001, column 3: '\\x00' is not a residue" in line
    assert "--skip-bad-records" in line


@pytest.mark.parametrize("comments", ["; made by hand\n", "# a\n#b\n\n;; c\n \n", "\ufeff\r\n# a\r\n",
                                      ";" + "x" * 200_000 + "\n"])
def test_comments_before_the_first_header_of_a_fasta_are_left_out(tmp_path, monkeypatch, comments):
    (tmp_path / "plain").write_text(">a # b\nMKV\n>;\nM\n")
    (tmp_path / "in").write_text(comments + ">a # b\nMKV\n>;\nM\n", encoding="utf-8", newline="")
    assert ids_of(tmp_path, tmp_path / "in") == ids_of(tmp_path, tmp_path / "plain")
    line = damaged(tmp_path, (comments + ">a\nM1\n>b\nMK\n").encode())
    assert f"line {len(comments.splitlines()) + 2}, column 2" in line


def test_comments_before_anything_else_are_refused(tmp_path):
    assert "line 3: comments, and behind them 'id,sequence'" in damaged(tmp_path, b"# a\n\nid,sequence\nP1,MK\n")
    assert "line 2: comments, and behind them nothing" in damaged(tmp_path, b"# a\n")


@pytest.mark.parametrize(("data", "place"), [
    (b">a\nMK\n >b\nVL\n>c\nM\n", "line 3, column 2: '>' within a record"),
    (b">a\nMK>b\nVL\n", "line 2, column 3: '>' within a record"),
    (b"MK\nVL\n>b\nM\nMK\n", "line 3: a FASTA header")])
def test_no_header_is_swallowed_by_the_record_before_it(tmp_path, data, place):
    for skip_bad_records in (False, True):
        line = damaged(tmp_path, data, skip_bad_records=skip_bad_records)
        assert place in line
        assert "--skip-bad-records" not in line


def test_skipping_is_advised_for_single_records_alone(tmp_path):
    assert line_advises(damaged(tmp_path, b">a\nMK\n>b\nM1\n>c\nMK\n"))
    for data in (b'{"seq": "MK"}\n' * 5, b">a\nM1\n>b\nM1\n>c\nMK\n", b'{"text": "M1"}', b">a\nM*K\n>b\nM*V\n"):
        assert not line_advises(damaged(tmp_path, data))


def line_advises(line: str) -> bool:
    return "leave such records out with --skip-bad-records" in line


def test_a_file_whose_first_records_are_mostly_bad_is_not_skipped_through(tmp_path):
    good, bad, stop = b'{"text": "MK"}\n', b'{"name": "MK"}\n', b'{"text": "M*K"}\n'
    line = damaged(tmp_path, 2 * good + 3 * bad, skip_bad_records=True)
    assert "3 of 5 records are bad here" in line
    assert "no key 'text'" in line
    for data in (3 * good + 3 * bad, good + 9 * stop):
        (tmp_path / "in").write_bytes(data)
        ids_of(tmp_path, tmp_path / "in", skip_bad_records=True)


def test_bad_records_behind_many_good_ones_are_skipped_however_many(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "BLOCK_BYTES", 64)
    (tmp_path / "in").write_bytes(b'{"text": "MK"}\n' * 20 + b'{"text": "M1"}\n' * 30)
    ids_of(tmp_path, tmp_path / "in", skip_bad_records=True)
