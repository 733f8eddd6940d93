"""Files of variants: what is read, what is refused by file and line, and the files written to the output folder."""

import csv
import gzip
import json
import os
import re

import numpy as np
import pytest

from megatron.data.corpus.vocab import Vocab
from megatron.errors import ConfigError, DataError, ResidueError, UserError
from megatron.infer.variants import substitutions_picture
from megatron.infer.variants.assays import AssayKeys, files_of, read_assay
from megatron.infer.variants.averages import averaged
from megatron.infer.variants.mutants import Substitution, letters_of, parse_mutant
from megatron.infer.variants.record import ScoringRecord
from megatron.infer.variants.substitutions_picture import GROUPS, draw_substitutions
from megatron.infer.variants.wild_types import read_wild_types
from megatron.log import Log
from megatron.parallel.mesh import Mesh
from tests.unit.test_pretrained import saved
from tools.score_variants import parser, score, tables

WILD = "MKTAYIAKQR"
VOCAB, USUAL = Vocab.from_file(), AssayKeys()
ASSAY = """mutant,mutated_sequence,DMS_score,note
M1A,AKTAYIAKQR,0.5,"one, two"
K2W:A7C,MWTAYICKQR,,
R10E,MKTAYIAKQE,-1.5,x
M1A,AKTAYIAKQR,0.25,again
"""


def write(path, text):
    path.write_text(text)
    return path


def read(path, keys=USUAL, scoring="masked-marginals", **given):
    wild_types = read_wild_types(given.get("sequence"), given.get("fasta"), given.get("reference"), VOCAB)
    return read_assay("A", path, wild_types, letters_of(VOCAB), keys=keys, scoring=scoring)


def test_mutants_are_read_as_proteingym_writes_them():
    assert parse_mutant("A1P:D12N") == (Substitution(0, "A", "P"), Substitution(11, "D", "N"))
    assert parse_mutant(" a24p ", offset=24) == (Substitution(0, "A", "P"),)


@pytest.mark.parametrize(("hgvs", "same"), [
    ("p.Ala1Pro", "A1P"), ("p.(Ala1Pro)", "A1P"), ("NP_1.2:p.ala1PRO", "A1P"), ("p.A1P", "A1P"), ("p.Ala1=", "A1A"),
    ("p.[Ala1Pro;Asp12Asn]", "A1P:D12N"), ("p.[(Ala1Pro);(Asp12Asn)]", "A1P:D12N"), ("p.(Sec3Xaa)", "U3X")])
def test_substitutions_are_read_as_hgvs_writes_them(hgvs, same):
    assert parse_mutant(hgvs) == parse_mutant(same)
    assert parse_mutant("p.=") == parse_mutant("p.(=)") == ()


@pytest.mark.parametrize(("text", "what"), [
    ("p.Ala1Ter", "is a stop, and only substitutions can be scored"), ("p.Ala1*", "is a stop"),
    ("p.Ala1del", "is a deletion,"), ("p.Ala1_Asp2insLys", "is an insertion"), ("p.Ala1dup", "is a duplication"),
    ("p.Ala1_Lys3delinsTrp", "is a deletion with an insertion"), ("p.Ala1ProfsTer23", "is a frameshift"),
    ("p.Ter110GlnextTer17", "is an extension"), ("p.[Ala1Pro];[Asp12Asn]", "is not of the form A1P"),
    ("p.Met1?", "is not of the form"), ("p.Foo1Ala", "is not of the form"), ("Ala1Pro", "is not of the form")])
def test_what_hgvs_writes_that_is_no_substitution_is_named(text, what):
    with pytest.raises(ResidueError, match=f"mutant '{re.escape(text)}' {re.escape(what)}"):
        parse_mutant(text)


MAVEDB = """accession,hgvs_nt,hgvs_splice,hgvs_pro,score
urn:1#1,NA,NA,p.Ala4Val,0.3
urn:1#2,NA,NA,p.[Lys2Arg;Thr3=],NA
urn:1#3,NA,NA,p.=,1.5
"""


def test_a_file_of_mavedb_is_read_and_its_measured_column_is_named(tmp_path):
    path = write(tmp_path / "A.csv", MAVEDB)
    assay = read(path, AssayKeys(measured="score"), sequence=WILD)
    assert assay.variants == [parse_mutant("A4V"), parse_mutant("K2R:T3T"), ()]
    np.testing.assert_array_equal(assay.measured, [0.3, np.nan, 1.5])
    assert assay.identity != read(path, sequence=WILD).identity
    write(path, MAVEDB.replace("hgvs_pro", "change"))
    assert read(path, AssayKeys("change", "score"), sequence=WILD).variants == assay.variants
    for keys, what in ((AssayKeys(), "no column 'mutant' among .*; --mutant-key names it"),
                       (AssayKeys("change", "DMS"), "no column 'DMS' among .*; --measured-key names what was")):
        with pytest.raises(DataError, match=what):
            read(path, keys, sequence=WILD)


INDELS = f"""mutated_sequence,DMS_score
{WILD[1:]},0.5
{WILD}W,0.25
M A{WILD},-1
"""


def test_insertions_and_deletions_are_read_for_pseudo_likelihoods(tmp_path):
    path = write(tmp_path / "A.csv", INDELS)
    assert read(path, scoring="pseudo-ppl").variants == [WILD[1:], WILD + "W", "MA" + WILD]
    assert read(path, scoring="pseudo-ppl", sequence=WILD).variants[1] == WILD + "W"
    with pytest.raises(DataError, match="no column 'mutant' among mutated_sequence, DMS_score; --mutant-key names it; "
                                        "a mutated_sequence alone, .* can be scored by --scoring pseudo-ppl"):
        read(path, sequence=WILD)


@pytest.mark.parametrize(("row", "scoring", "what"), [
    (",MKTAY", "masked-marginals", "line 3: has no mutant; a mutated_sequence alone, .* --scoring pseudo-ppl"),
    (",NaN", "pseudo-ppl", "line 3: the protein has no residue"),
    (",MK-A", "pseudo-ppl", "line 3: column 3: '-' is not a residue"),
])
def test_a_row_with_a_mutated_sequence_alone_is_a_variant_for_pseudo_likelihoods(row, scoring, what, tmp_path):
    head = "mutant,mutated_sequence\nM1A,AKTAYIAKQR\n"
    assert read(write(tmp_path / "A.csv", f"{head},MKTAY\n"), scoring="pseudo-ppl").variants == [
        parse_mutant("M1A"), "MKTAY"]
    with pytest.raises(DataError, match=what):
        read(write(tmp_path / "A.csv", f"{head}{row}\n"), scoring=scoring)


def test_the_wild_type_is_worked_out_where_it_is_not_given(tmp_path):
    assay = read(write(tmp_path / "A.csv", ASSAY))
    assert assay.wild_type == WILD
    assert assay.variants[1] == (Substitution(1, "K", "W"), Substitution(6, "A", "C"))
    np.testing.assert_array_equal(assay.measured, [0.5, np.nan, -1.5, 0.25])


@pytest.mark.parametrize(("delimiter", "name"), [(",", "A.csv"), (";", "A.csv"), ("\t", "A.csv"), ("\t", "A.tsv")])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_columns_may_be_parted_by_what_preprocessing_takes(delimiter, name, end, tmp_path):
    lines = ["mutant,DMS_score,note", 'M1A,0.5,"a"', "K2W:A7C,,x"]
    (tmp_path / name).write_bytes("".join(line.replace(",", delimiter) + end for line in lines).encode())
    assay = read(tmp_path / name, sequence=WILD)
    assert (assay.table.columns, assay.table.rows[0]) == (["mutant", "DMS_score", "note"], ["M1A", "0.5", "a"])
    assert [len(mutant) for mutant in assay.variants] == [1, 2] and assay.measured[0] == 0.5


def test_the_wild_type_of_a_reference_or_a_fasta_is_taken_by_the_name_of_the_file(tmp_path):
    path = write(tmp_path / "A.csv", "mutant\nM1A\n")
    reference = write(tmp_path / "ref.csv", "DMS_id,DMS_filename,target_seq,UniProt_ID,coarse_selection_type\n"
                      f"B,B.csv,AAA,P1,Binding\nA1,A.csv,{WILD},P2,Stability\n")
    assay = read(path, reference=reference)
    assert (assay.wild_type, assay.said) == (WILD, {"uniprot": "P2", "category": "Stability"})
    fasta = write(tmp_path / "all.fasta", ">B other\nAAA\n>A some words\nmktay\niakqr*\n")
    assert read(path, fasta=str(fasta)).wild_type == WILD
    one = write(tmp_path / "one.fasta", f">whatever\n{WILD}\n")
    assert read(path, fasta=str(one)).wild_type == read(path, sequence=WILD.lower()).wild_type == WILD


def test_a_list_is_any_other_file_and_both_may_be_packed(tmp_path):
    path = write(tmp_path / "A.txt", "M1A\n\n K2W:A7C\n")
    assert len(read(path, sequence=WILD).variants) == 2
    for header in ("mutant", "hgvs_pro"):
        headed = read(write(path, f"{header}\nM1A\n"), sequence=WILD)
        assert (headed.table.columns, headed.variants, headed.table.lines) == ([header], [parse_mutant("M1A")], [2])
    packed = tmp_path / "B.csv.gz"
    packed.write_bytes(gzip.compress(("\ufeff" + ASSAY.replace("\n", "\r\n")).encode()))
    assert read(packed).wild_type == WILD
    assert list(files_of([path, packed], None)) == ["A", "B"]


def test_a_folder_stands_for_its_csvs_but_the_reference(tmp_path):
    for name in ("b.csv", "a.csv", "ref.csv", "notes.md"):
        write(tmp_path / name, ASSAY)
    assert list(files_of([tmp_path], tmp_path / "ref.csv")) == ["a", "b"]
    with pytest.raises(DataError, match="is called a, too"):
        files_of([tmp_path, tmp_path / "a.csv"], None)


EXCEL = b"mutant;Ver\xe4nd;note\r\nM1A;0.5;\xe9\r\nR10E;1;x\r\n"


def test_columns_in_the_encoding_of_excel_are_read_and_written_as_they_are(tmp_path):
    path = tmp_path / "A.csv"
    path.write_bytes(EXCEL)
    np.testing.assert_array_equal(read(path, AssayKeys(measured="Ver\xe4nd"), sequence=WILD).measured, [0.5, 1])
    with pytest.raises(DataError, match="there is no column 'mut' among mutant, Ver\xe4nd, note"):
        read(path, AssayKeys("mut"), sequence=WILD)
    for _ in range(2):  # the second finds its own file
        run(saved(tmp_path / "run"), path, tmp_path / "out", "--sequence", WILD)
        lines = (tmp_path / "out" / "A.csv").read_bytes().splitlines()
        assert lines[0] == b"mutant,Ver\xe4nd,note,score" and lines[1].startswith(b"M1A,0.5,\xe9,")
        (tmp_path / "out" / "summary.json").unlink()


@pytest.mark.parametrize("content", [EXCEL.decode("latin-1").encode("utf-16"), b"PK\x03\x04\x00\x00"])
def test_a_table_that_is_no_text_is_refused(content, tmp_path):
    (tmp_path / "A.csv").write_bytes(content)
    with pytest.raises(DataError, match="A.csv: is binary or UTF-16; save it as text in UTF-8"):
        read(tmp_path / "A.csv", sequence=WILD)


@pytest.mark.parametrize(("text", "what"), [
    ("", "A.csv: is empty"),
    ("\n \n", "A.csv: is empty"),
    ("mutant,DMS_score\n", "A.csv: holds no variant"),
    ("variant,DMS_score\nM1A,1\n", "A.csv: line 1: there is no column 'mutant' among variant, DMS_score"),
    ("mutant,DMS_score\nM1A,1\nK2W\n", "A.csv: line 3: has 1 fields, and the header 2; mend it, or leave such records "
     "out with --skip-bad-records"),
    ("mutant\nM1A\nR11A\n", "A.csv: line 3: R11A: the protein has the residues 1 to 10; --offset"),
    ("mutant\nM0A\n", "A.csv: line 2: M0A: the protein has the residues 1 to 10"),
    ("mutant\nM1A\nK2W:C7A\n", "A.csv: line 3: C7A: residue 7 of the protein is A"),
    ("mutant\nM1A\nM1\n", "A.csv: line 3: mutant 'M1' is not of the form A1P"),
    ("mutant\nM1*\n", "A.csv: line 2: mutant 'M1\\*' is not of the form"),
    ("mutant\nM1A:M1C\n", "A.csv: line 2: mutant 'M1A:M1C' substitutes one residue twice"),
    ("mutant\nM1J\n", "A.csv: line 2: M1J: J is not in the model's vocabulary"),
    ("mutant,mutated_sequence\nM1A,AKTAYIAKQR\nM1C,CKTAYIWKQR\n",
     "A.csv: line 3: mutated_sequence is not what mutant M1C makes of the wild type: residue 7 is W, and should be A"),
    ("mutant,mutated_sequence\nM1A,AKTAYIAKQ\n", "A.csv: line 2: mutated_sequence has 9 residues, and the protein 10"),
    ("mutant,DMS_score\nM1A,high\n", "A.csv: line 2: DMS_score is 'high', which is no number"),
    ("mutant;DMS_score\nM1A;0,5\n", "A.csv: line 2: DMS_score is '0,5', which is no number; write a decimal point"),
    ("mutant,DMS_score\nM1A,0,5\n", "A.csv: line 2: has 3 fields, and the header 2 .a number with a decimal comma"),
    ('mutant\n"M1A\n', "A.csv: line 2: is no CSV"),
])
def test_a_mistake_in_a_file_is_named_by_its_line(text, what, tmp_path):
    with pytest.raises(DataError, match=what):
        read(write(tmp_path / "A.csv", text), sequence=WILD)


@pytest.mark.parametrize(("text", "what"), [
    ("mutant\nM1A\n", "says nothing of the wild type"),
    ("mutant,mutated_sequence\nM1A,KKTAYIAKQR\n", "line 2: mutated_sequence is not what M1A says: residue 1 is K"),
    ("mutant,mutated_sequence\nM1A,AKTAY1AKQR\n", "line 2: column 6: '1' is not a residue of the model's vocabulary"),
    ("mutant,mutated_sequence\nM1A,AKT\nK4A,MKTA\n", "line 3: K4A: the protein has the residues 1 to 3"),
])
def test_a_mistake_in_what_the_wild_type_is_worked_out_from_is_named(text, what, tmp_path):
    with pytest.raises(DataError, match=what):
        read(write(tmp_path / "A.csv", text))


def test_a_mistake_in_a_wild_type_that_is_given_is_named(tmp_path):
    path = write(tmp_path / "A.csv", ASSAY)
    with pytest.raises(ResidueError, match="--sequence: column 2: '-' is not a residue"):
        read(path, sequence="M-K")
    with pytest.raises(DataError, match=r"p.fasta: x: residue 3 is not in the model's vocabulary"):
        read(path, fasta=str(write(tmp_path / "p.fasta", ">x\nMKJ\n")))
    with pytest.raises(DataError, match="proteins 1 and 2 both have the name x .*; mend it, or leave it out$"):
        read(path, fasta=str(write(tmp_path / "p.fasta", ">x\nMK\n>x\nMK\n")))
    with pytest.raises(DataError, match="none of the 2 proteins of --fasta is called A"):
        read(path, fasta=str(write(tmp_path / "p.fasta", ">x\nMK\n>y\nMK\n")))
    with pytest.raises(DataError, match="ref.csv has no line whose DMS_id is A"):
        read(path, reference=write(tmp_path / "ref.csv", "DMS_id,target_seq\nB,MK\n"))
    with pytest.raises(DataError, match="ref.csv: line 1: there is no column 'target_seq'"):
        read(path, reference=write(tmp_path / "ref.csv", "DMS_id\nB\n"))


def facts(spearman, uniprot, category):
    return {"spearman": spearman, "uniprot": uniprot, "category": category}


def test_averages_are_over_proteins_then_functions():
    found = averaged([facts(0.1, "P1", "Activity"), facts(0.5, "P1", "Activity"), facts(0.6, "P2", "Activity"),
                      facts(0.9, "P1", "Stability"), facts(None, "P3", "Stability"), facts(0.9, "", "")])
    activity = ((0.1 + 0.5) / 2 + 0.6) / 2
    assert found["categories"] == {"Activity": {"spearman": pytest.approx(activity), "proteins": 2},
                                   "Stability": {"spearman": pytest.approx(0.9), "proteins": 1}}
    assert found["spearman"] == pytest.approx((activity + 0.9) / 2)
    # Of two proteins drawn twice the mean has a variance of half theirs, and half of it goes into the average.
    assert found["standard_error"] == pytest.approx((0.6 - 0.3) / 2 / 2**0.5 / 2, rel=0.03)
    assert averaged([facts(0.9, "", "")]) == {}


def test_the_table_says_what_the_summary_does():
    assays = {"A": facts(0.25, "P1", "Binding") | {"variants": 1234, "sites": 9, "interval": [0.125, 0.375]},
              "B": facts(None, "", "") | {"variants": 1, "sites": 1, "interval": None}}
    assert tables(assays, averaged(list(assays.values()))).splitlines() == [
        "assay  variants  sites  Spearman    95% interval",
        "A         1,234      9     0.250  0.125 to 0.375",
        "B             1      1",
        "",
        "function  proteins  Spearman  standard error",
        "Binding          1     0.250",
        "average                0.250         ± 0.000"]


def run(*flags):
    score(parser().parse_args([str(flag) for flag in flags]), Mesh(), Log())


def test_scores_stand_behind_what_was_read_and_a_file_that_is_done_is_not_done_again(tmp_path, capsys):
    model, out = saved(tmp_path / "run"), tmp_path / "out"
    first, second = write(tmp_path / "A.csv", ASSAY), write(tmp_path / "B.txt", "M1A\nR10E\n")
    command = (model, first, second, out, "--sequence", WILD)
    run(*command)
    rows = list(csv.reader((out / "A.csv").open()))
    assert [row[:-1] for row in rows] == list(csv.reader(ASSAY.splitlines()))
    assert rows[0][-1] == "score" and rows[1][-1] == rows[4][-1]
    listed = list(csv.DictReader((out / "B.csv").open()))
    assert [float(row["score"]) for row in listed] == pytest.approx([float(rows[at][-1]) for at in (1, 3)], abs=1e-5)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["assays"]["A"]["variants"] == 4 and abs(summary["assays"]["A"]["spearman"]) <= 1
    assert summary["assays"]["B"]["spearman"] is None
    assert "A: 4 variants at 4 sites, Spearman" in capsys.readouterr().out

    before = os.stat(out / "A.csv").st_mtime_ns
    (out / "B.csv").unlink()  # as if it had been killed before
    run(*command)
    assert os.stat(out / "A.csv").st_mtime_ns == before and (out / "B.csv").exists()
    assert "1 of 2 files are done already" in capsys.readouterr().out
    write(first, ASSAY.replace("R10E,MKTAYIAKQE", "R10D,MKTAYIAKQD"))
    run(*command)
    assert "R10D" in (out / "A.csv").read_text()


def test_scores_of_a_file_of_mavedb_stand_beside_its_own_and_the_wild_type_has_zero(tmp_path):
    path, out = write(tmp_path / "A.csv", MAVEDB + "urn:1#4,NA,NA,p.Ile6Leu,2\n"), tmp_path / "out"
    command = (saved(tmp_path / "run"), path, out, "--sequence", WILD, "--measured-key", "score")
    with pytest.raises(DataError, match="has a column 'score' already; --score-column names the new one"):
        run(*command)
    run(*command, "--score-column", "model")
    rows = list(csv.DictReader((out / "A.csv").open()))
    assert [row["score"] for row in rows] == ["0.3", "NA", "1.5", "2"] and float(rows[2]["model"]) == 0
    assert json.loads((out / "summary.json").read_text())["assays"]["A"]["spearman"] is not None
    wild = write(tmp_path / "wild.txt", "p.=\n")
    run(saved(tmp_path / "run"), wild, tmp_path / "again", "--sequence", WILD)
    assert (tmp_path / "again" / "wild.csv").read_text() == "mutant,score\np.=,0.000000\n"


def test_insertions_and_deletions_have_the_scores_of_the_same_proteins_as_substitutions(tmp_path, capsys):
    model, indels = saved(tmp_path / "run"), write(tmp_path / "indels.csv", f"{INDELS}AKTAYIAKQR,1\n")
    listed = write(tmp_path / "listed.txt", "M1A\n")
    run(model, indels, listed, tmp_path / "out", "--sequence", WILD, "--scoring", "pseudo-ppl")
    rows = [list(csv.DictReader((tmp_path / "out" / f"{name}.csv").open())) for name in ("indels", "listed")]
    assert float(rows[0][3]["score"]) == pytest.approx(float(rows[1][0]["score"]), abs=1e-5)
    assert len({row["score"] for row in rows[0]}) == 4
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["assays"]["indels"]
    assert (summary["variants"], summary["skipped"]) == (4, 0) and summary["spearman"] is not None
    assert "indels: 4 variants, Spearman" in capsys.readouterr().out


def test_variants_that_cannot_be_scored_are_left_out_and_keep_their_rows_where_that_is_asked_for(tmp_path, capsys):
    good = ["M1A,AKTAYIAKQR,0.5", "K2W:A7C,MWTAYICKQR,", "R10E,MKTAYIAKQE,-1.5"]
    bad = ["M1*,*KTAYIAKQR,1", ",MKTAYIAKQR,1", "A1AP,APKTAYIAKQR,1", "M1C,CTAYIAKQR,1", "C1A,AKTAYIAKQR,1",
           "R11A,MKTAYIAKQRA,1", "M1J,JKTAYIAKQR,1", "M1V,VKTAYIAKQR,high", "M1L", "M1L,LKTAYIAKQR,1,2", "wt,,"]
    head, model = "mutant,mutated_sequence,DMS_score", saved(tmp_path / "run")
    for name, lines in (("all", [head, *bad[:4], *good[:2], *bad[4:], good[2]]), ("good", [head, *good])):
        path = write(tmp_path / f"{name}.csv", "\n".join(lines))
        run(model, path, tmp_path / "out", *(["--skip-bad-records"] if name == "all" else []))
    said = capsys.readouterr().out
    assert f"skipped 11 records of {tmp_path}/all.csv, 3 are left: cannot be scored 11" in said
    assert f"skipped: {tmp_path}/all.csv: line 2: mutant 'M1*' is not of the form A1P" in said
    rows = {name: list(csv.DictReader((tmp_path / "out" / f"{name}.csv").open())) for name in ("all", "good")}
    assert [row["mutant"] for row in rows["all"]] == [line.split(",")[0] for line in (*bad[:4], *good[:2], *bad[4:],
                                                                                      good[2])]
    assert [row for row in rows["all"] if row["score"]] == rows["good"]
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["assays"]
    assert [(found[name]["variants"], found[name]["skipped"]) for name in ("all", "good")] == [(3, 11), (3, 0)]
    assert found["all"]["spearman"] == found["good"]["spearman"]
    with pytest.raises(DataError, match="none.csv: no variant is left .skipped: cannot be scored 2"):
        run(model, write(tmp_path / "none.csv", "mutant\nM1*\nM1\n"), tmp_path / "out", "--sequence", WILD,
            "--skip-bad-records")


def test_variants_of_unknown_residues_have_no_score_and_that_is_said(tmp_path, capsys):
    standard = ["M1A,0.5", "K2W,2", "R10E,-1.5", "T3A,1"]
    odd = ["X4A,9", "M1X,-9", "K2W:Q9B,9"]
    protein, model = WILD[:3] + "X" + WILD[4:], saved(tmp_path / "run")
    for name, lines in (("all", [*odd[:2], *standard, odd[2]]), ("few", standard)):
        run(model, write(tmp_path / f"{name}.csv", "\n".join(["mutant,DMS_score", *lines])), tmp_path / "out",
            "--sequence", protein)
    said = capsys.readouterr().out
    assert "all: 4 variants at 4 sites" in said and said.count("none of the 20 standard amino acids") == 1
    assert "; 3 more have no score" in said
    rows = {name: list(csv.DictReader((tmp_path / "out" / f"{name}.csv").open())) for name in ("all", "few")}
    assert [row["score"] == "" for row in rows["all"]] == [True, True, *4 * [False], True]
    assert rows["all"][2:-1] == rows["few"]
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["assays"]
    assert found["all"]["spearman"] == found["few"]["spearman"] and found["all"]["skipped"] == 3
    with pytest.raises(DataError, match="none.csv: no variant can be scored"):
        run(model, write(tmp_path / "none.csv", "mutant\nX4A\n"), tmp_path / "out", "--sequence", protein)


def test_a_run_that_is_stopped_loses_the_file_that_it_was_at_alone(tmp_path, monkeypatch, capsys):
    files = [write(tmp_path / f"{name}.txt", "M1A\n") for name in "ABC"]
    command = (saved(tmp_path / "run"), *files, tmp_path / "out", "--sequence", WILD)
    told = ScoringRecord.tell

    def stopped(record, kind, name, facts):
        if name == "B":  # its scores are written, and nothing tells of them yet
            raise KeyboardInterrupt
        told(record, kind, name, facts)

    monkeypatch.setattr(ScoringRecord, "tell", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(*command)
    monkeypatch.setattr(ScoringRecord, "tell", told)
    capsys.readouterr()
    run(*command)
    said = capsys.readouterr().out
    assert "1 of 3 files are done already" in said and "B: 1 variants" in said and "A: 1 variants" not in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["A.csv", "B.csv", "C.csv", "summary.json"]


def test_what_a_reference_says_later_counts_without_scoring_again(tmp_path):
    command = (saved(tmp_path / "run"), write(tmp_path / "A.csv", ASSAY), tmp_path / "out")
    run(*command)
    before = (tmp_path / "out" / "A.csv").stat().st_mtime_ns
    run(*command, "--reference", write(tmp_path / "ref.csv", "DMS_id,target_seq,UniProt_ID,coarse_selection_type\n"
                                       f"A,{WILD},P1,Binding\n"))
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["average"]["spearman"] == summary["assays"]["A"]["spearman"]
    assert (tmp_path / "out" / "A.csv").stat().st_mtime_ns == before


def test_heat_maps_of_the_proteins_of_a_file_are_drawn_once(tmp_path, capsys):
    proteins = write(tmp_path / "p.fasta", f">a/b words\n{WILD}\n>c\nMKV\n")
    command = (saved(tmp_path / "run"), proteins, tmp_path / "out", "--heatmap", "--offset", "5")
    run(*command)
    run(*command)
    assert capsys.readouterr().out.count("is done already") == 2
    assert (tmp_path / "out" / "a_b.substitutions.png").read_bytes().startswith(b"\x89PNG")
    both = write(tmp_path / "both.fasta", f">a/b\n{WILD}\n>a_b\nMKV\n")
    with pytest.raises(DataError, match="proteins 1 and 2 both have the name a_b .*/ counts as _"):
        run(command[0], both, tmp_path / "again", "--heatmap")
    lines = (tmp_path / "out" / "a_b.substitutions.csv").read_text().splitlines()
    assert len(lines) == 1 + len(WILD) and lines[-1].startswith("14,R,")


@pytest.mark.parametrize(("flags", "what"), [
    (("--heatmap", "--scoring", "pseudo-ppl"), "--scoring pseudo-ppl; give masked-marginals"),
    (("--heatmap", "--sequence", "MK"), "--sequence is for files of variants"),
    (("--heatmap", "--mutant-key", "mutant"), "--mutant-key is for files of variants"),
    (("--heatmap", "--skip-bad-records"), "--skip-bad-records is for files of variants"),
    (("--sequence", "MK", "--fasta", "x"), "both give the wild type"),
    (("--window", "64"), "--window is 64; it must be 1 or greater, and at most 63"),
    (("--score-column", "note"), "A.csv: line 1: has a column 'note' already"),
])
def test_flags_that_cannot_be_honoured_are_refused(flags, what, tmp_path):
    path = write(tmp_path / "A.csv", ASSAY)
    with pytest.raises(UserError, match=what):
        run(saved(tmp_path / "run"), path, tmp_path / "out", *flags)
    assert not list((tmp_path / "out").glob("*.csv"))


def test_inputs_are_not_written_over_and_must_be_there(tmp_path):
    path, model = write(tmp_path / "A.csv", ASSAY), saved(tmp_path / "run")
    with pytest.raises(DataError, match="A.csv itself lies there; give another folder"):
        run(model, path, tmp_path)
    with pytest.raises(DataError, match="none.csv: no such file"):
        run(model, path, tmp_path / "none.csv", tmp_path / "out")
    (tmp_path / "out" / "summary.json").write_text("{}")
    with pytest.raises(DataError, match="summary.json: is no summary of scores"):
        run(model, path, tmp_path / "out")


def test_a_file_that_holds_no_scores_is_not_replaced(tmp_path, monkeypatch):
    listed, model = write(tmp_path / "gfp.txt", "M1A\nR10E\n"), saved(tmp_path / "run")
    measured = write(tmp_path / "gfp.csv", "mutant,DMS_score\nM1A,0.5\nR10E,1.5\n")
    monkeypatch.setattr("megatron.infer.variants.run.scores_of", None)
    with pytest.raises(DataError, match="gfp.csv: is there, and holds no scores of this program; give another folder"):
        run(model, listed, tmp_path, "--sequence", WILD)
    assert "0.5" in measured.read_text()


@pytest.mark.parametrize("flags", [(), ("--heatmap",)])
def test_scores_that_are_not_finite_are_not_ranked(flags, tmp_path, monkeypatch):
    def overflown(pretrained, scoring, protein, mutants, *rest):
        return np.where(np.arange(len(mutants)) == 1, np.nan, 0.5)

    monkeypatch.setattr("megatron.infer.variants.run.scores_of", overflown)
    monkeypatch.setattr("megatron.infer.variants.run.all_substitutions", lambda *_: np.full((10, 20), np.nan))
    path = write(tmp_path / "p.fasta", f">A\n{WILD}\n") if flags else write(tmp_path / "A.csv", ASSAY)
    with pytest.raises(ConfigError, match="A: .* scores are not finite.* give fp32 or bf16"):
        run(saved(tmp_path / "run"), path, tmp_path / "out", *flags)
    assert not list((tmp_path / "out").iterdir())


def test_a_folder_of_other_scores_is_refused(tmp_path):
    command = (saved(tmp_path / "run"), write(tmp_path / "A.csv", ASSAY), tmp_path / "out")
    run(*command)
    with pytest.raises(ConfigError, match="are of scoring masked-marginals, and wt-marginals is asked for"):
        run(*command, "--scoring", "wt-marginals")


def test_every_amino_acid_has_a_line_of_its_own_in_the_picture(tmp_path):
    assert sorted("".join(GROUPS.values())) == sorted("ACDEFGHIKLMNPQRSTVWY")
    protein = "ACDEFGHIKLMNPQRSTVWYX" * 5  # two lines
    draw_substitutions(protein, np.random.default_rng(0).normal(size=(105, 20)), 1, "title", tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 10_000


def test_a_heat_map_takes_its_colours_from_positions_that_have_scores(tmp_path, capsys, monkeypatch):
    limits, draw_line = [], substitutions_picture._draw_line
    monkeypatch.setattr(substitutions_picture, "_draw_line", lambda *given: (limits.append(given[-1]),
                                                                             draw_line(*given))[1])
    scores = np.random.default_rng(0).normal(size=(10, 20))
    draw_substitutions(WILD, scores, 1, "title", tmp_path / "map.png")
    draw_substitutions(f"X{WILD}", np.vstack([np.full(20, np.nan), scores]), 1, "title", tmp_path / "map.png")
    assert limits[0] == limits[1]
    run(saved(tmp_path / "run"), write(tmp_path / "p.fasta", f">a\n{WILD}XU\n"), tmp_path / "out", "--heatmap")
    assert "; 2 of 12 residues are none of the 20 standard amino acids and have no scores" in capsys.readouterr().out
    with pytest.raises(DataError, match="a: has none of the 20 standard amino acids"):
        run(tmp_path / "run", write(tmp_path / "p.fasta", ">a\nXXU\n"), tmp_path / "out", "--heatmap")
