"""CSV and TSV: the column that --json-keys names is read verbatim, and no header or row is taken for a protein."""

import re

import pytest

from megatron.data.preprocess.flags import PreprocessConfig
from megatron.data.preprocess.run import preprocess
from megatron.data.sources import streams
from megatron.data.sources.source import Source, records_of, texts_of
from tests.unit.protein_files import damaged, ids_of


@pytest.mark.parametrize(("data", "proteins"), [
    (b'id,text\nP1,MKV\n"a, ""b""",M\n', ["MKV", "M"]),
    (b'text;x\n"MKV";1,5\nM;2\n', ["MKV", "M"]),
    (b'"text"\n"MKV"\n"M"\n', ["MKV", "M"]),
    (b"text\nMKV\n\nM", ["MKV", "M"]),
    (b'\xef\xbb\xbfn\ttext\r\n5"-end\tMKV\r\n\r\n"q"\t"M"\r\n', ["MKV", "M"]),
    (b"\tn\ttext\n0\ta\tMKV\n1\tb\tM\n", ["MKV", "M"]), (b"\n\ttext\nABL\tMKV\nL\tM\n", ["MKV", "M"]),
    (b"text,n\n,1\nM K V*,2\nm-k.,\xe9\n", ["", "MKV", "MK"]),
    (b"id,text\nP1," + b"A" * 200_000 + b"\nP2,M\n", ["A" * 200_000, "M"])])
def test_a_named_column_is_read(tmp_path, monkeypatch, data, proteins):
    monkeypatch.setattr(streams, "_CHUNK_BYTES", 11)
    (tmp_path / "plain").write_text("".join(f">a\n{protein}\n" for protein in proteins))
    (tmp_path / "in").write_bytes(data)
    assert ids_of(tmp_path, tmp_path / "in") == ids_of(tmp_path, tmp_path / "plain")


def test_several_columns_give_an_output_each(tmp_path):
    (tmp_path / "in").write_bytes(b'name,heavy,light\n"a b",MK,V\nc,C,A\n')
    preprocess(PreprocessConfig(input=(str(tmp_path / "in"),), output_prefix=str(tmp_path / "out"), names=True,
                                json_keys=("heavy", "light"), name_key="name"))
    assert (tmp_path / "out_light_document.names").read_bytes() == b"a\nc\n"
    assert (tmp_path / "out_light_document.bin").stat().st_size == 4


@pytest.mark.parametrize(("data", "message"), [
    (b"id,Sequence\nP1,MKV\n", "is CSV with no column 'text'; it has 'id', 'Sequence'. --json-keys names the column: "
                               "--json-keys Sequence"),
    (b"Entry\tprotein_sequence\nP1\tMKV\n", "is TSV with no column 'text'; .* --json-keys protein_sequence"),
    (b"Ver\xe4nd;seqs\n1;MKV\n", "it has 'Ver\xe4nd', 'seqs'"),
    (b"sequence\nMKVLLA\n", "is CSV with no column 'text'; it has 'sequence'.* --json-keys sequence$"),
    (b"SEQ\nMKVLLA\n", "is CSV with no column 'text'; it has 'SEQ'"),
    (b"seq,primary\nMKV,M\n", "it has 'seq', 'primary'. --json-keys names the column$"),
    (b"P1,MKV\nP2,MKL\n", "it has 'P1', 'MKV'. --json-keys names the column$"),
    (b"text,text\nM,K\n", "is CSV with 2 columns 'text'"),
    (b"id,text\nP1,MKV\nP2,M1\n", "line 3, column 2 of the text: '1' is not a residue"),
    (b"id,text\n\nP1,MKV\nP2,M,K\n", "line 4: 3 fields where the header has 2"),
    (b'id,text\nP1,MKV\n"P"2,M\n', "line 3: not a row of CSV"),
    (b'id,text\nP1,MKV\nP2,"M\nK"\n', "line 3: a quoted field that does not end on its line; write the table"),
    (b'id,text\n"P1', "is text of another kind|is CSV"),
    (b"id,text\n", "is text of another kind"),
    (b"text\n", "holds no record")])
def test_what_is_wrong_in_a_table_is_one_clear_line(tmp_path, data, message):
    assert re.search(message, damaged(tmp_path, data))


def test_a_column_in_the_encoding_of_excel_can_be_named_and_read(tmp_path):
    (tmp_path / "in").write_bytes(b"Ver\xe4nd;note\nMKV;caf\xe9 \x96\nM;x\n")
    (block,) = Source(str(tmp_path / "in")).blocks()
    assert [record["note"] for _, record in records_of(block)] == ["caf\xe9 \u2013", "x"]
    (block,) = Source(str(tmp_path / "in")).blocks(("Ver\xe4nd",))
    assert texts_of(block, "Ver\xe4nd").texts == [b"MKV", b"M"]


def test_a_quote_that_takes_the_next_lines_with_it_is_never_skipped(tmp_path):
    rows = b"id,text\n" + b"P,MKV\n" * 20
    assert "does not end on its line" in damaged(tmp_path, rows + b'P,"M\nK,V"\n', skip_bad_records=True)


def test_names_need_their_column(tmp_path):
    assert "no column 'id'; it has 'n', 'text'. --name-key names" in damaged(tmp_path, b"n,text\nP,M\n", names=True)
    assert "line 3: no name under 'id'" in damaged(tmp_path, b"id,text\nP,M\n ,K\n", names=True)
