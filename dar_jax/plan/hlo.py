"""What a compiled program does in one call, read from XLA's text of it (optimised HLO, the program of one device).

XLA's own cost analysis counts the body of a loop once, and says nothing of collectives. Here everything counts as often as
it runs: loops by their number of turns, and a collective that is spread over several fused computations, so that products
run while it does, once.
"""

import collections
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dar_jax.models.attention import PERMUTATION
from dar_jax.training.flops import window_taps

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Products of float32 in so many passes of bfloat16 ones, which is what a TPU's matrix unit multiplies.
PASSES = {"default": 1, "high": 3, "highest": 6}

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_OP = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*?)\)(.*)")
_SHAPE = re.compile(r"([a-z]+\d*)\w*\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"\b(?:calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BODY = r"\bbody=%?([\w.-]+)"
_BRANCHES = r"\bbranch_computations=\{([^}]*)\}"
# What moves nothing: names for values, and what is counted inside of it or where it begins.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
_FREE |= {"partition-id", "replica-id", "opt-barrier"}


@dataclass(frozen=True)
class Shape:
    """An array: `dims`, bytes of an element, its type's name, and whether it is in the device's main memory (HBM)."""

    dims: tuple[int, ...]
    width: float
    dtype: str
    in_hbm: bool

    @property
    def bytes(self) -> float:
        return math.prod(self.dims) * self.width


@dataclass(frozen=True)
class Op:
    """One instruction: its name, kind, results, the text between its brackets and what follows them."""

    name: str
    kind: str
    shapes: tuple[Shape, ...]
    arguments: str
    attributes: str
    root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.arguments)

    def attribute(self, pattern: str, default: str = "") -> str:
        """The first group of a regular expression in the attributes."""
        found = re.search(pattern, self.attributes)
        return found[1] if found else default


Computations = dict[str, dict[str, Op]]  # by name, callees before callers; the last one is where the program starts


@dataclass(frozen=True)
class Collective:
    """Communication of one kind: `count` calls a step, `bytes` that each device sends, and of these, bytes outside of loops."""

    kind: str
    count: float
    bytes: float
    bytes_outside_loops: float


def parse(text: str) -> Computations:
    """The computations of a module. Raises ValueError for a text that has none."""
    computations: Computations = {}
    entry, ops = None, {}
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            ops = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif found := _OP.match(line):
            root, name, kind_of_result, kind, arguments, attributes = found.groups()
            ops[name] = Op(name, kind, _shapes(kind_of_result), arguments, attributes, bool(root))
    if entry is None:
        raise ValueError("this is no HLO module: it has no ENTRY")
    computations[entry] = computations.pop(entry)
    return computations


def executions(computations: Computations) -> dict[str, float]:
    """How often each computation runs in one call. Every branch of a conditional counts; a loop of unknown length runs once."""
    times = collections.Counter({next(reversed(computations)): 1.0})
    for name in reversed(computations):
        for op in computations[name].values() if times[name] else ():
            turns = _turns(computations, op) if op.kind == "while" else 1
            for called in _called(op):
                times[called] += times[name] * turns
    return {name: times[name] for name in computations}


def matrix_flops(computations: Computations, times: Mapping[str, float], passes: bool = False) -> float:
    """Floating-point operations of the matrix products of one device in one call, without those that only permute numbers;
    with `passes`, these count too, and high-precision float32 products once per pass of a TPU's matrix unit."""
    total = 0.0
    for name, op in _runs(computations, times):
        if op.kind in ("dot", "convolution") and (passes or PERMUTATION not in op.attributes):
            sides = [computations[name][operand].shapes[0] for operand in op.operands]
            flops = (_dot_flops if op.kind == "dot" else _convolution_flops)(op, *sides[:2])
            is_float32 = any(side.dtype == "f32" for side in sides)
            repeats = PASSES[op.attribute(r"operand_precision=\{(\w+)", "default")] if passes and is_float32 else 1
            total += times[name] * repeats * flops
    return total


def has_kernels(computations: Computations) -> bool:
    """True where there are hand-written kernels, inside of which nothing is counted."""
    return any("tpu_custom_call" in op.attributes for ops in computations.values() for op in ops.values())


def collectives(computations: Computations, times: Mapping[str, float], devices: int) -> list[Collective]:
    """The communication of one call by kind, most bytes first. The bytes that each device sends are those of ring algorithms,
    the fewest possible: 2 (n - 1) / n of what n devices sum up, (n - 1) / n of what they gather, scatter or exchange."""
    calls, seen = collections.defaultdict(list), set()
    for name, op in _runs(computations, times):
        kind = op.kind.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        if chain := op.attribute(r'chain_id="(\w+)"'):  # the parts of one collective, each fused with other work
            if chain in seen:
                continue
            seen.add(chain)
        size, n = sum(shape.bytes for shape in op.shapes), _group(op, devices)
        if kind == "all-reduce" and name.startswith("all-reduce-scatter"):  # of which a device keeps only its part
            kind = "reduce-scatter"
        elif kind == "reduce-scatter":
            size *= n
        elif op.kind == "all-gather-start":  # its type has the parts beside the whole
            size *= n / (n + 1)
        elif op.kind == "collective-permute-start":
            size = op.shapes[0].bytes
        share = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1.0}.get(kind, (n - 1) / n)
        total = times[name] * share * size
        calls[kind].append((times[name], total, total if times[name] == 1 else 0.0))
    rows = [Collective(kind, *map(sum, zip(*each))) for kind, each in calls.items()]
    return sorted(rows, key=lambda row: -row.bytes)


def hbm_bytes(computations: Computations, times: Mapping[str, float]) -> float:
    """Bytes that one device reads from and writes to its main memory in one call.

    Where a computation only reads slices of an array, or writes a slice into it, the slices count. What stays in the matrix
    unit's own memory does not count, nor does the padding of tiles.
    """
    ordinary = {next(reversed(computations))}  # whose operations are carried out one by one
    for _, op in _runs(computations, times):
        if op.kind == "while":
            ordinary.add(op.attribute(_BODY))
        elif op.kind in ("call", "conditional"):
            ordinary.update(_called(op))
    total = 0.0
    for name, op in _runs(computations, times):
        free = op.kind in _FREE or op.kind.endswith("-done") or "AllocateBuffer" in op.attributes
        if name in ordinary and not free:
            total += times[name] * _moved(computations, computations[name], op)
    return total


def _moved(computations: Computations, ops: dict[str, Op], op: Op) -> float:
    operands = [shape for operand in op.operands for shape in ops[operand].shapes]
    if op.kind in ("copy-start", "slice-start"):  # (one side, the other, a flag), between two memories
        one, other = op.shapes[:2]
        return min(one.bytes, other.bytes) * (one.in_hbm + other.in_hbm)
    if op.kind in ("slice", "dynamic-slice", "gather"):
        return 2 * _in_hbm(op.shapes)
    if op.kind == "dynamic-update-slice":
        return 2 * _in_hbm(operands[1:2])
    if op.kind == "fusion":
        return _moved_by_fusion(computations, op)
    return _in_hbm(op.shapes) + _in_hbm(operands)


def _read(computations: Computations, inside: dict[str, Op], name: str) -> float:
    """Bytes that a fused computation reads of one of its values: those of slices, where it reads nothing else of it."""
    whole, total = sum(shape.bytes for shape in inside[name].shapes), 0.0
    for user in inside.values():
        for place, operand in enumerate(user.operands):
            if operand != name or user.kind == "tuple":
                continue
            if user.kind in ("dynamic-slice", "slice", "gather") and place == 0:
                total += user.shapes[0].bytes
            elif user.kind == "bitcast":
                total += _read(computations, inside, user.name)
            elif user.kind == "fusion":
                called = computations[_called(user)[0]]
                parameter = next(o.name for o in called.values() if o.kind == "parameter" and o.arguments == str(place))
                total += _read(computations, called, parameter)
            elif user.kind != "dynamic-update-slice" or place != 0:  # of which the old array is no input, but the result
                total += whole
    return min(total, whole)


def _written(computations: Computations, inside: dict[str, Op], op: Op) -> list[float]:
    """Bytes that a fused computation writes for each of its results: of an array updated in place, the new slice."""
    if op.kind == "tuple":
        return [sum(_written(computations, inside, inside[operand])) for operand in op.operands]
    if op.kind == "bitcast":
        return _written(computations, inside, inside[op.operands[0]])
    if op.kind == "fusion":
        called = computations[_called(op)[0]]
        return _written(computations, called, next(o for o in called.values() if o.root))
    if op.kind == "dynamic-update-slice":
        return [sum(shape.bytes for shape in inside[op.operands[1]].shapes)]
    return [0.0 if op.kind == "parameter" else shape.bytes for shape in op.shapes]


def _moved_by_fusion(computations: Computations, op: Op) -> float:
    inside = computations[_called(op)[0]]
    parameters = [o for o in inside.values() if o.kind == "parameter" and o.shapes and o.shapes[0].in_hbm]
    read = sum(_read(computations, inside, parameter.name) for parameter in parameters)
    written = _written(computations, inside, next(o for o in inside.values() if o.root))
    return read + sum(size for size, shape in zip(written, op.shapes) if shape.in_hbm)


def _in_hbm(shapes: Sequence[Shape]) -> float:
    return sum(shape.bytes for shape in shapes if shape.in_hbm)


def _runs(computations: Computations, times: Mapping[str, float]) -> Iterator[tuple[str, Op]]:
    for name, ops in computations.items():
        if times[name]:
            for op in ops.values():
                yield name, op


def _called(op: Op) -> list[str]:
    if op.kind not in ("while", "fusion", "call", "conditional") and not op.kind.endswith("-start"):
        return []  # sums and sorts call a computation for every element
    return [*_CALLED.findall(op.attributes), *re.findall(r"%([\w.-]+)", op.attribute(_BRANCHES))]


def _turns(computations: Computations, op: Op) -> int:
    if known := op.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
        return int(known)
    condition = computations[op.attribute(r"condition=%?([\w.-]+)")]
    test = next((o for o in condition.values() if o.root), None)
    if test is None or test.kind != "compare" or "direction=LT" not in test.attributes:
        return 1
    last = condition[test.operands[1]]  # loops of JAX count from 0 in steps of 1
    return int(last.arguments) if last.kind == "constant" else 1


def _group(op: Op, devices: int) -> int:
    """The number of devices that communicate with each other."""
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", op.attributes):
        axes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or axes[axis]) for axis, part in parts)
    if size := op.attribute(r"replica_groups=\[\d+,(\d+)\]<="):
        return int(size)
    first = op.attribute(r"replica_groups=\{\{([\d,]+)\}")
    return len(first.split(",")) if first else devices


def _dot_flops(op: Op, left: Shape, right: Shape) -> float:
    summed = [int(i) for i in re.findall(r"\d+", op.attribute(r"lhs_contracting_dims=\{([\d,]*)\}"))]
    return 2.0 * math.prod(op.shapes[0].dims) * math.prod(left.dims[i] for i in summed)


def _convolution_flops(op: Op, image: Shape, kernel: Shape) -> float:
    of_image, of_kernel, of_out = re.split("_|->", op.attribute(r"dim_labels=(\w+->\w+)"))
    window = dict(re.findall(r"(\w+)=(\S+)", op.attribute(r"window=\{([^}]*)\}")))
    taps = 1
    for axis in filter(str.isdigit, of_out):

        def part(name: str, default: str = "1", axis: int = int(axis)) -> str:
            return window[name].split("x")[axis] if name in window else default

        low = int(part("pad", "0_0").split("_")[0])
        sizes = (image.dims[of_image.index(axis)], kernel.dims[of_kernel.index(axis)], op.shapes[0].dims[of_out.index(axis)])
        taps *= window_taps(*sizes, int(part("stride")), low, int(part("lhs_dilate")), int(part("rhs_dilate")))
    images, channels = (op.shapes[0].dims[of_out.index(letter)] for letter in "bf")
    return 2.0 * images * channels * kernel.dims[of_kernel.index("i")] * taps


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(tuple(int(n) for n in dims.split(",") if n), _width(dtype), dtype, "S(" not in (layout or ""))
        for dtype, dims, layout in _SHAPE.findall(text)
    )


def _width(dtype: str) -> float:
    """Bytes of an element: `bf16` 2, `pred` 1, `s4` a half."""
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) / 8 if bits else {"token": 0.0}.get(dtype, 1.0)
