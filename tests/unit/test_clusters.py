"""--blend-by cluster takes one member of each cluster per epoch."""

from collections import Counter

import numpy as np
import pytest

from megatron.config import DataConfig
from megatron.data.corpus.joined import open_corpus
from megatron.data.corpus.vocab import Vocab
from megatron.data.preprocess.flags import PreprocessConfig
from megatron.data.preprocess.run import preprocess
from megatron.data.rows.clusters import Clusters, cluster_documents
from megatron.data.rows.dataset import build_datasets
from megatron.data.rows.packing import order_key
from megatron.errors import ConfigError, DataError
from tests.indexed_files import write_indexed

VOCAB = Vocab.from_file()
CLUSTERS = "a\ta\na\tb\na\tc\nd\td\nd\te\nx\ty\n"  # f is in none, x and y are no documents


@pytest.fixture
def prefix(tmp_path):
    """Six proteins a to f, of which each has a length of its own; the first is longer than a row."""
    write_indexed(tmp_path / "p", [np.full(length, 6) for length in (100, 11, 12, 13, 14, 15)])
    (tmp_path / "p.names").write_text("a\nb\nc\nd\ne\nf\n")
    (tmp_path / "clusters.tsv").write_text(CLUSTERS)
    return tmp_path / "p"


def dataset(prefix, long_proteins):
    data = DataConfig(data_path=(str(prefix),), seq_length=64, split="1,0,0", blend_by="cluster",
                      cluster_file=str(prefix.parent / "clusters.tsv"), long_proteins=long_proteins)
    return build_datasets(data, VOCAB, 1).train


def lengths_of_epochs(train, number):
    """The lengths of all proteins, or parts of them, that the rows of each epoch hold, in residues."""
    first = 0
    for epoch in range(number):
        num_rows = train.num_epoch_rows(epoch)
        yield sorted(int(n) - 1 for row in range(num_rows) for n in train[first + row].lengths)
        first += num_rows


def test_an_epoch_draws_each_member_equally_often():
    clusters = Clusters(np.array([7, 7, 7, 2, 2, 5]))
    draws = [tuple(sorted(clusters.draw(order_key(epoch)))) for epoch in range(600)]
    counts = Counter(document for draw in draws for document in draw)
    assert {sum(np.isin(group, draw)) for draw in draws for group in ((0, 1, 2), (3, 4), (5,))} == {1}
    assert all(abs(counts[i] - 200) < 60 for i in (0, 1, 2)) and all(abs(counts[i] - 300) < 60 for i in (3, 4))
    assert counts[5] == 600


@pytest.mark.parametrize("named", [True, False])
def test_documents_are_clustered_by_name_or_number(prefix, named):
    if not named:
        (prefix.parent / "p.names").unlink()
        (prefix.parent / "clusters.tsv").write_text(CLUSTERS.translate(str.maketrans("abcdef", "012345")))
    clusters = cluster_documents(str(prefix.parent / "clusters.tsv"), open_corpus("p", (str(prefix),)), prefix.parent)
    assert clusters.cluster_of_document.tolist() == [0, 0, 0, 3, 3, 5]


@pytest.mark.parametrize("long_proteins", ["crop", "split"])
def test_an_epoch_of_a_dataset_holds_one_protein_of_each_cluster(prefix, long_proteins):
    train, members = dataset(prefix, long_proteins), set()
    for lengths in lengths_of_epochs(train, 30):
        assert lengths[-1] == 15 or lengths[-1] in (37, 63)
        drawn = [n if n not in (37, 63) else 100 for n in lengths if not (long_proteins == "split" and n == 37)]
        assert [sum(n in group for n in drawn) for group in ((100, 11, 12), (13, 14), (15,))] == [1, 1, 1]
        members.update(drawn)
    assert members == {100, 11, 12, 13, 14, 15}
    assert ("6 proteins in 3 clusters (clusters.tsv: 6 members, 1 of them not in the data; proteins of the data in "
            "none of its clusters: 1, each one by itself)") in train.describe()


def test_an_epoch_has_every_part_of_the_long_proteins_it_draws(prefix):
    numbers = [(lengths.count(63), lengths.count(37)) for lengths in lengths_of_epochs(dataset(prefix, "split"), 30)]
    assert set(numbers) == {(0, 0), (1, 1)}


def test_clusters_are_read_once_and_again_where_what_was_kept_is_damaged(prefix):
    arguments = str(prefix.parent / "clusters.tsv"), open_corpus("p", (str(prefix),)), prefix.parent
    expected = cluster_documents(*arguments)
    kept, = prefix.parent.glob("*.npz")
    whole = kept.read_bytes()
    for damaged in (b"", whole[:100], b"x" * len(whole)):
        kept.write_bytes(damaged)
        found = cluster_documents(*arguments)
        assert found.cluster_of_document.tolist() == [0, 0, 0, 3, 3, 5] and found.match == expected.match
        assert len(kept.read_bytes()) == len(whole)


def test_names_match_in_full_and_as_mmseqs2_shortens_them(prefix):
    names = b"sp|P1|A_HUMAN\ntr|Q2|B_MOUSE\nUniRef50_P3\nref|NP_4.1|\ngi|55|gb|AA5.1|\nodd|\xe9\xff\n"
    (prefix.parent / "p.names").write_bytes(names)
    short = [b"P1", b"Q2", b"UniRef50_P3", b"NP_4.1", b"AA5.1", b"odd|\xe9\xff"]
    for members in (short, names.splitlines()):
        (prefix.parent / "clusters.tsv").write_bytes(b"".join(b"P1\t%s\n" % member for member in members))
        corpus = open_corpus("p", (str(prefix),))
        clusters = cluster_documents(str(prefix.parent / "clusters.tsv"), corpus, prefix.parent)
        assert clusters.cluster_of_document.tolist() == [0] * 6


def test_documents_that_share_a_name_share_their_cluster(prefix):
    (prefix.parent / "p.names").write_text("a\nb\nb\nc\nc\nd\n")
    (prefix.parent / "clusters.tsv").write_text("a\ta\na\tb\n")
    clusters = cluster_documents(str(prefix.parent / "clusters.tsv"), open_corpus("p", (str(prefix),)), prefix.parent)
    assert clusters.cluster_of_document.tolist() == [0, 0, 0, 3, 3, 5]
    assert "proteins of the data in none of its clusters: 3" in clusters.match


def test_a_fasta_and_the_clusters_that_mmseqs2_makes_of_it_need_nothing_else(tmp_path):
    """The cluster file has a protein that was left out; each protein is of one letter and fills a row."""
    letters = "ACDEFGHIK"
    headers = [f"sp|P{n}|X{n}_HUMAN Protein {n} OS=Homo sapiens" if n % 2 else f"UniRef90_Q{n} n=1" for n in range(9)]
    records = [f">{header}\n{letter * (3 if letter == 'F' else 20)}\n"
               for header, letter in zip(headers, letters, strict=True)]
    (tmp_path / "in.fasta").write_text("".join(records))
    names = [f"P{n}" if n % 2 else f"UniRef90_Q{n}" for n in range(9)]
    groups = [[0, 1, 2, 3], [4, 5], [6, 7, 8]]  # 4 is too short
    (tmp_path / "c_cluster.tsv").write_text("".join(
        f"{names[group[0]]}\t{names[member]}\n" for group in groups for member in group))
    preprocess(PreprocessConfig(input=(str(tmp_path / "in.fasta"),), output_prefix=str(tmp_path / "out"), names=True,
                                min_length=4))
    data = DataConfig(data_path=(str(tmp_path / "out_text_document"),), seq_length=21, split="1,0,0",
                      blend_by="cluster", cluster_file=str(tmp_path / "c_cluster.tsv"))
    train = build_datasets(data, VOCAB, 1).train
    assert "8 proteins in 3 clusters (c_cluster.tsv: 9 members, 1 of them not in the data" in train.describe()
    drawn, first = [], 0
    for epoch in range(30):
        rows = [train[first + row] for row in range(train.num_epoch_rows(epoch))]
        drawn.append("".join(VOCAB.tokens[row.target_ids_m[0]] for row in rows))
        first += len(rows)
    for epoch_letters in drawn:
        assert sorted(sum(letters[n] in epoch_letters for n in group) for group in groups) == [1, 1, 1]
        assert len(epoch_letters) == 3
    assert set("".join(drawn)) == set(letters) - {"F"}


@pytest.mark.parametrize("text, message", [("a b\n", "line 1 has 1 columns"), ("a\tb\na\n", "line 2 has 1 columns"),
                                           ("x\ty\n", "none of its 1 members is a document")])
def test_a_bad_cluster_file_is_an_error(prefix, text, message):
    (prefix.parent / "clusters.tsv").write_text(text)
    with pytest.raises(DataError, match=message):
        cluster_documents(str(prefix.parent / "clusters.tsv"), open_corpus("p", (str(prefix),)), prefix.parent)


def test_without_names_the_error_says_how_to_get_them(prefix):
    (prefix.parent / "p.names").unlink()
    with pytest.raises(DataError, match=r"there is no .*p\.names, which tools/preprocess_data.py --names writes"):
        cluster_documents(str(prefix.parent / "clusters.tsv"), open_corpus("p", (str(prefix),)), prefix.parent)


def test_too_few_names_are_an_error(prefix):
    (prefix.parent / "p.names").write_text("a\n")
    with pytest.raises(DataError, match="p.names: 1 names for 6 documents"):
        cluster_documents(str(prefix.parent / "clusters.tsv"), open_corpus("p", (str(prefix),)), prefix.parent)


@pytest.mark.parametrize("flags, message", [
    ({"blend_by": "cluster"}, "go together"), ({"cluster_file": "c.tsv"}, "go together"),
    ({"blend_by": "cluster", "cluster_file": "c.tsv", "data_path": ("1", "a", "1", "b")}, "with 2 data paths"),
    ({"blend_by": "cluster", "cluster_file": "missing.tsv"}, "missing.tsv: no such file")])
def test_flags_that_do_not_go_together_are_an_error(prefix, flags, message):
    with pytest.raises((ConfigError, DataError), match=message):
        build_datasets(DataConfig(**{"data_path": (str(prefix),), "seq_length": 64, **flags}), VOCAB, 1)
