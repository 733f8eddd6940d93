"""Installs the project: `pip install .`, or `pip install -e .`, as `examples/setup.sh` does in its own environment.

The version ranges here are those that the code supports; `requirements.txt` pins the tested versions. The C++
helpers are optional: they pack proteins into rows and, on CPUs, compute attention and the operations between matrix
products. Without a C++ compiler or pybind11, the equivalent Python code is used, which is slower.
"""

import sys
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup

REQUIRED = ["torch>=2.11.0a0", "numpy>=1.26", "safetensors>=0.4", "tensorboard>=2.14", "tqdm>=4.60", "matplotlib>=3.7",
            "tomli>=2.0 ; python_version < '3.11'"]
EXTRAS = {
    "helper": ["pybind11>=2.11", "setuptools>=64"],  # builds the C++ helpers
    "fast": ["orjson>=3.8", "isal>=1.5"],  # reads JSON and gzip faster than the standard library
    "sentences": ["nltk>=3.8"],  # tools/preprocess_data.py --split-sentences
    "hdf5": ["h5py>=3.8"],  # .h5 files of tools/embed.py
    "structures": ["gemmi>=0.6.5"],  # tools/predict_contacts.py on PDB and mmCIF files
    "yaml": ["PyYAML>=6"],  # --config FILE.yaml
    "docs": ["sphinx>=8.1", "myst-parser>=4.0", "furo>=2024.8.6"],  # python -m sphinx docs docs/_build/html
    "notebook": ["ipykernel>=6.29", "nbclient>=0.10", "nbformat>=5.10"],  # examples/notebook.ipynb
    "formats": ["lmdb>=1.4", "pyarrow>=15", "zstandard>=0.21"],  # TAPE's LMDB, Parquet and Arrow, .zst
}


def extensions() -> list[Extension]:
    """The C++ helpers; an empty list if pybind11 is missing."""
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        return []
    threads = ["-fopenmp"] if sys.platform == "linux" else []  # PyTorch's pool, already loaded
    return [Pybind11Extension("megatron.data.rows._packing", ["megatron/data/rows/packing.cpp"], cxx_std=17,
                              extra_compile_args=["-O3"], optional=True),
            Pybind11Extension("megatron.kernels.pointwise._pointwise", ["megatron/kernels/pointwise/pointwise.cpp"],
                              cxx_std=17, extra_link_args=threads, optional=True,
                              depends=[f"megatron/kernels/pointwise/{name}.h"
                                       for name in ("convolution", "heads", "numbers", "residual_norm")],
                              extra_compile_args=["-O3", "-fwrapv", "-ffp-contract=fast", "-fno-math-errno",
                                                  "-fno-trapping-math", "-Wno-unknown-pragmas", *threads]),
            Pybind11Extension("megatron.kernels.attention._packed_attention",
                              ["megatron/kernels/attention/packed_attention.cpp"],
                              cxx_std=17, extra_link_args=threads, optional=True,
                              extra_compile_args=["-O3", "-ffp-contract=fast", "-Wno-unknown-pragmas", *threads],
                              depends=[f"megatron/kernels/attention/packed_attention{rest}"
                                       for rest in (".h", "_blocks.inc", "_kernels.inc")])]


def commands() -> list[str]:
    """The entry point of each program: `proteinlm-pretrain`, `proteinlm-preprocess`, `proteinlm-embed` and so on."""
    names = [path.stem.removesuffix("_data").replace("_", "-") for path in sorted(Path("tools").glob("*.py"))]
    return [f"proteinlm-{name} = megatron.console:run" for name in ("pretrain", *names)]


setup(
    name="proteinlm-pretrain",
    version="0.1.0",
    description="Pretraining of masked protein language models on packed proteins, Megatron-style",
    license="Apache-2.0",
    # tools/ is installed under megatron/, because other projects may have a package named tools too.
    packages=[*find_namespace_packages(include=["megatron*", "protein_tools*"]), "megatron.tools"],
    package_dir={"megatron.tools": "tools"},
    package_data={"protein_tools": ["*.txt"], "megatron.config.presets": ["*/*.toml"]},
    py_modules=["pretrain_tape"],
    entry_points={"console_scripts": commands()},
    ext_modules=extensions(),
    setup_requires=["pybind11>=2.11"],  # to build the C++ helpers
    python_requires=">=3.10",
    install_requires=REQUIRED,
    extras_require=EXTRAS,
)
