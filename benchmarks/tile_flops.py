"""Counts the FLOPs of a Triton kernel by reading its intermediate code, with calls inlined.

Operations on floats count as one each, also exponentials and divisions. Operations on integers (addresses, dropout's
generator), comparisons and selections do not count. The code is that of one tile. The number of tiles is the number
that it takes to load or store the largest tensor once; among equally large tensors, the one with the smallest part in a
tile decides, because others may be loaded repeatedly, as by neighbouring rows. So the grid, loops and padded columns do
not matter.
"""

import re
from collections.abc import Mapping
from math import prod
from typing import Any

from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

_CAPABILITY = 90  # any will do, since this code does not depend on the GPU yet
_POINTER = re.compile(r"(%[\w.#-]+) = (?:tt\.splat|tt\.addptr|tt\.broadcast|tt\.bitcast) (%[\w.#-]+)")
_MOVE = re.compile(r"tt\.(?:load|store) (%[\w.#-]+).*tensor<([\dx]+)x!tt\.ptr")
_FLOAT = re.compile(r"= (?:arith\.(?:add|sub|mul|div|rem|max\w*|min\w*|neg)f|math\.\w+|tt\.precise\w+|tt\.extern\w+) "
                    r".*tensor<([\dx]+)xf\d+>$")
_SUM = re.compile(r"^}\) : \(tensor<([\dx]+)xf\d+>")


def code_of(source: ASTSource, options: Mapping[str, int]) -> list[str]:
    """The lines of a kernel's Triton IR, with calls inlined and without source locations."""
    target = GPUTarget("cuda", _CAPABILITY, 32)
    backend, context = make_backend(target), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    parsed = backend.parse_options(dict(options))
    module = source.make_ir(target, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(),
                            context)
    text = str(backend.make_ttir(module, {}, parsed, _CAPABILITY))
    return [re.sub(r" loc\(.*$", "", line).strip() for line in text.splitlines()]


def flops_of_tiles(code: list[str], tensors: Mapping[str, Any]) -> int:
    """The FLOPs of a kernel that processes `tensors`, its arguments by name, in two-dimensional tiles."""
    base, moved, flops = dict[str, str](), dict.fromkeys(tensors, 0), 0
    for line in code:
        if pointer := _POINTER.match(line):
            base[pointer[1]] = base.get(pointer[2], pointer[2][1:])
        elif move := _MOVE.search(line):
            moved[base[move[1]]] += _num_elements(move[2])
        elif operation := _FLOAT.search(line) or _SUM.search(line):
            flops += _num_elements(operation[1])
    largest = max((name for name, size in moved.items() if size),
                  key=lambda name: (_numel(tensors[name]), -moved[name]))
    return flops * _numel(tensors[largest]) // moved[largest]


def _numel(value: Any) -> int:
    return value.numel() if isinstance(value, Tensor) else 0


def _num_elements(shape: str) -> int:
    return prod(map(int, shape.split("x")))
