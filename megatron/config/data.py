"""The flags of the data: corpora, vocabulary, packing, masking."""

import os
from dataclasses import dataclass

from megatron.config.declaration import flag, not_negative, positive

VOCABULARIES = ("iupac", "esm", "protbert")  # families; each is protein_tools/NAME_vocab.txt


@dataclass(frozen=True)
class DataConfig:
    """The corpora, the packing of proteins into rows and the masking."""

    data_path: tuple[str, ...] = flag(None, "prefix of PREFIX.bin and PREFIX.idx; several, or @LIST, a file with one a "
                                      "line, are one corpus; WEIGHT PREFIX … are weighted corpora", nargs="+",
                                      changes="samples", common=True, path="prefix")
    split: str = flag("969,30,1", "comma-separated shares or exact counts of training, validation and test documents",
                      changes="samples", common=True)
    vocab_file: str = flag(None, f"vocabulary of the model: {', '.join(VOCABULARIES)}, a file with one token a line, "
                           "or a folder with a transformers tokenizer (default: iupac); ids of data that were "
                           "preprocessed with another one are mapped by letter",
                           aliases=("--vocab",), changes="vocabulary", common=True, path="file")
    mask_token: str = flag(None, "the mask token, if the vocabulary calls it neither [MASK] nor <mask>",
                           changes="vocabulary")
    protein_ends: str = flag("start", "tokens around each protein of a row: start, only [CLS] before it; both, also "
                             "[SEP] after it (<cls> and <eos> with esm)", choices=("start", "both"),
                             changes="arithmetic")
    tokenizer_type: str = flag("BertWordPieceCase", "all types read residues, spaced or not, in upper or lower case, "
                               "with a protein vocabulary", choices=("BertWordPieceLowerCase", "BertWordPieceCase"),
                               changes="nothing", may_differ=True)
    seq_length: int = flag(None, "positions in a row", kind=int, check=(lambda v: v >= 2, "2 or greater"),
                           aliases=("--encoder-seq-length",), changes="samples", common=True)
    data_impl: str = flag("infer", "format of the indexed dataset", choices=("infer", "mmap", "cached", "lazy"),
                          changes="nothing", may_differ=True)
    mask_prob: tuple[float, ...] = flag((0.15,), "share of residues to predict; START END SAMPLES changes it from "
                                        "START to END over so many rows; evaluations always mask 15 %", kind=float,
                                        nargs="+", check=positive, changes="samples", common=True)
    mask_token_prob: float = flag(0.8, "share of these residues replaced by [MASK]", kind=float,
                                  check=(lambda v: 0 <= v <= 1, "between 0 and 1"), changes="samples")
    mask_random_prob: float = flag(0.1, "share of these residues replaced by a random residue", kind=float,
                                   check=(lambda v: 0 <= v <= 1, "between 0 and 1"), changes="samples")
    mask_span_length: float = flag(1.0, "mean length of masked spans (geometric); 1 masks single residues", kind=float,
                                   check=(lambda v: v >= 1, "1 or greater"), changes="samples")
    packing: str = flag("best-fit", "how proteins are packed into rows", choices=("best-fit", "sequential"),
                        changes="samples")
    long_proteins: str = flag("crop", "of a protein longer than a row, take a random window, take consecutive pieces "
                              "(as in every evaluation), or take nothing", choices=("crop", "split", "drop"),
                              changes="samples")
    data_cache_path: str = flag(None, "folder of the row index (default: beside the data, or the user's cache folder)",
                                changes="nothing", path="folder", may_differ=True)
    blend_by: str = flag("weight", "weight: mix several data paths in proportion; cluster: draw one protein of each "
                         "cluster each epoch", choices=("weight", "cluster"), changes="samples")
    cluster_file: str = flag(None, "clusters for --blend-by cluster: one representative and member a line, separated "
                             "by a tab; members are names in PREFIX.names, which preprocess_data.py --names writes, or "
                             "document numbers from 0", changes="samples", path="file")
    num_workers: int = flag(2, "processes that prepare batches ahead; 0 prepares them in the training process",
                            kind=int, check=not_negative, changes="nothing", may_differ=True)
    mmap_warmup: bool = flag(False, "read the whole dataset into the page cache at the start", changes="nothing",
                             may_differ=True)

    @property
    def absolute_vocab_file(self) -> str | None:
        """--vocab-file with an absolute path, for checkpoints, which may be read from another working directory."""
        return self.vocab_file if self.vocab_file in (None, *VOCABULARIES) else os.path.abspath(self.vocab_file)

    @property
    def num_ends(self) -> int:
        """The number of special tokens around each protein in a row."""
        return {"start": 1, "both": 2}[self.protein_ends]
