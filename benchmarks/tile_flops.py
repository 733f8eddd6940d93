"""How much arithmetic a Triton kernel does on tensors, read off its own code after Triton has inlined it.

Operations on floats, an exponential or a division counted as one; what is done to integers (addresses, dropout's
generator), comparisons and choices are not counted. A tile of rows and columns does what its code says; there are as
many tiles as it takes to load or store the largest tensor once, of several the one that a tile has the least of:
neighbours' rows are loaded again and again. So neither grid, loop nor columns that are filled up count.
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

_CAPABILITY = 90  # the code is the same for any: nothing has been chosen for a GPU yet
_POINTER = re.compile(r"(%[\w.#-]+) = (?:tt\.splat|tt\.addptr|tt\.broadcast|tt\.bitcast) (%[\w.#-]+)")
_MOVE = re.compile(r"tt\.(?:load|store) (%[\w.#-]+).*tensor<([\dx]+)x!tt\.ptr")
_FLOAT = re.compile(r"= (?:arith\.(?:add|sub|mul|div|rem|max\w*|min\w*|neg)f|math\.\w+|tt\.precise\w+|tt\.extern\w+) "
                    r".*tensor<([\dx]+)xf\d+>$")
_SUM = re.compile(r"^}\) : \(tensor<([\dx]+)xf\d+>")


def code_of(source: ASTSource, options: Mapping[str, int]) -> list[str]:
    """The lines of a kernel's code, calls inlined, without what they say of places in files."""
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
    """Of a kernel that goes over the elements of `tensors`, its arguments by name, in tiles of two dimensions."""
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
