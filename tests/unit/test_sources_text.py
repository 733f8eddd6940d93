"""Text files (JSON, FASTA, CSV, TSV, plain lines) are read whole, whatever their line ends, headers and blocks."""

import gzip
import json
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.data.corpus.indexed import open_indexed
from megatron.data.sources import streams
from megatron.data.sources.source import expand, texts_of
from megatron.errors import DataError
from tests.unit.protein_files import PROTEINS, TEXTS, as_json, damaged, ids_of


@pytest.mark.parametrize("line_end", [b"\r\n", b"\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("kind", TEXTS)
def test_line_ends_and_byte_order_marks_do_not_matter(tmp_path, kind, mark, line_end, monkeypatch):
    (tmp_path / "in").write_bytes(TEXTS[kind](PROTEINS))
    expected = ids_of(tmp_path, tmp_path / "in")
    monkeypatch.setattr(streams, "_CHUNK_BYTES", 7)
    (tmp_path / "in").write_bytes(mark + TEXTS[kind](PROTEINS).replace(b"\n", line_end))
    assert ids_of(tmp_path, tmp_path / "in") == expected


@pytest.mark.parametrize("header", [b"\xe9\xff latin", "é".encode(), b"\x00", b"", b"x" * 1_000_000, b">>> a > b"])
def test_headers_may_hold_anything(tmp_path, header):
    (tmp_path / "in.fasta").write_bytes(b">" + header + b"\nMKV\n>" + header + b"\nMKV\n")
    assert ids_of(tmp_path, tmp_path / "in.fasta")[:12] == np.array([17, 15, 26] * 2, np.uint16).tobytes()


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_a_lone_cr_in_a_header_does_not_make_residues_of_its_rest(tmp_path, monkeypatch, line_end):
    proteins = line_end.join([b">a", b"MKV", b">b made\rin spain\r", b"M\rK\r", b"V", b">c", b"MKV"])
    for chunk in (1, 7, 1 << 20):
        monkeypatch.setattr(streams, "_CHUNK_BYTES", chunk)
        (tmp_path / "in.fasta").write_bytes(proteins)
        assert ids_of(tmp_path, tmp_path / "in.fasta")[:18] == np.array([17, 15, 26] * 3, np.uint16).tobytes()


@pytest.mark.parametrize("rest", [b">b\rMKV\r>c\rMKV\r", b">b\rMKV\r", b">b\rMKV\r\n>c\nMKV\n"])
def test_no_protein_is_lost_where_later_lines_end_in_cr(tmp_path, rest):
    assert "line 4: a header that seems to end in CR" in damaged(tmp_path, b">a\nMKV\nM\rKV\n" + rest)


def test_a_latin_1_letter_among_residues_is_named(tmp_path):
    assert "line 2, column 2: 'é' is not a residue" in damaged(tmp_path, b">a\nM\xe9K\n")


def test_a_fasta_record_without_residues_is_a_counted_document(tmp_path):
    (tmp_path / "in.fasta").write_bytes(b"\n\n>a\n>b\nMK\n\n>c\n\n>d")
    ids_of(tmp_path, tmp_path / "in.fasta")
    assert open_indexed(str(tmp_path / "out_text_document")).doc_idx.tolist() == [0, 0, 1, 1, 1]


@given(proteins=st.lists(st.text(alphabet="ACDJ*-. \n", max_size=12), min_size=1, max_size=12),
       block=st.integers(1, 40), chunk=st.integers(1, 40), kind=st.sampled_from(["json", "fasta"]))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_where_blocks_end_never_matters(tmp_path, monkeypatch, proteins, block, chunk, kind):
    monkeypatch.setattr(streams, "BLOCK_BYTES", block)
    monkeypatch.setattr(streams, "_CHUNK_BYTES", chunk)
    (tmp_path / "in").write_bytes(TEXTS[kind](proteins))
    found = [text for source in expand([str(tmp_path / "in")]) for b in source.blocks(("text",))
             for text in texts_of(b, "text").texts]
    assert [text.split() for text in found] == [protein.encode().split() for protein in proteins] or kind == "fasta"
    assert [b"".join(text.split()) for text in found] == [b"".join(p.encode().split()) for p in proteins]


def test_an_error_in_a_later_block_names_the_right_line(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "BLOCK_BYTES", 64)
    for kind, line in (("json", 201), ("fasta", 402), ("strings", 201), ("csv", 202), ("tsv", 202)):
        (tmp_path / "in").write_bytes(TEXTS[kind](["MKV"] * 200 + ["MK7"]))
        with pytest.raises(DataError, match=f"line {line}, column 3"):
            ids_of(tmp_path, tmp_path / "in")


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_an_error_names_the_right_line_whatever_the_line_ends(tmp_path, monkeypatch, line_end):
    monkeypatch.setattr(streams, "_CHUNK_BYTES", 1)
    (tmp_path / "in").write_bytes(as_json(["M", "K", "M7"]).replace(b"\n", line_end))
    with pytest.raises(DataError, match="line 3, column 2"):
        ids_of(tmp_path, tmp_path / "in")


def test_many_bad_records_take_no_longer_than_good_ones(tmp_path):
    (tmp_path / "in").write_bytes(b"MK\n" * 40_001 + b"M1\n" * 40_000)
    ids_of(tmp_path, tmp_path / "in", skip_bad_records=True)
    stats = json.loads((tmp_path / "out.stats.json").read_text())
    assert stats["outputs"]["text"]["dropped"] == {"not protein": 40_000}


def test_a_long_record_in_small_chunks_is_searched_once(monkeypatch):
    monkeypatch.setattr(streams, "BLOCK_BYTES", 1 << 10)
    begun_s = time.process_time()
    assert [len(block) for block in streams.cut([b"A" * 64] * 100_000 + [b"\nMK\n"], b"\n", "in")] == [6_400_001, 3]
    assert time.process_time() - begun_s < 15  # searched anew with each chunk, it takes a minute


def test_a_record_without_end_is_refused_before_it_fills_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "BLOCK_BYTES", 1 << 10)
    monkeypatch.setattr(streams, "MAX_RECORD_BYTES", 1 << 20)
    assert "a record of more than" in damaged(tmp_path, gzip.compress(b"A" * (5 << 20)))
