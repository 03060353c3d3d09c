"""Plans for TPUs: what is read from compiled programs, the arithmetic on it, the search, and one real compilation."""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dar_jax import parallel
from dar_jax.cli import main as cli
from dar_jax.config import MeshConfig, OptimizerConfig, TokenizerLossConfig, TrainConfig, VelocityConfig
from dar_jax.errors import InputError
from dar_jax.experiment import Experiment
from dar_jax.plan import ENVIRONMENT, compiler, hlo, jobs, planner, report
from dar_jax.plan.chips import CHIPS, GIB, chip_of
from dar_jax.quickstart import TOKENIZER, TRANSFORMER
from dar_jax.training.flops import PEAKS, Product, count_flops
from dar_jax.training.stages import describe

EXPERIMENTS = Path(__file__).parent.parent / "experiments"

# A loop of 3 turns in one of 5, the inner one with its number only in its condition. The outer body gathers, in two fused
# parts, what is used in the inner one; sums up; and keeps a part of another sum.
MODULE = """
HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inner_condition (state: (s32[], f32[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(3)
  %state = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%inner_body (state.1: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %state.1 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  %x.1 = f32[4,8]{1,0:T(8,128)} get-tuple-element(%state.1), index=1
  %w.1 = f32[8,8]{1,0:T(8,128)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %dot.1 = f32[4,8]{1,0:T(8,128)} dot(%x.1, %w.1), lhs_contracting_dims={1}, operand_precision={highest,highest}
  ROOT %next.1 = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) tuple(%i.1, %dot.1)
}

%gather_start (a: bf16[2,8]) -> bf16[8,8] {
  %a = bf16[2,8]{1,0:S(1)} parameter(0)
  ROOT %g1 = bf16[8,8] all-gather(%a), replica_groups=mesh['x'=4], device_ids=([4]) {'x'}, frontend_attributes={chain_id="0"}
}

%gather_end (b: bf16[2,8]) -> bf16[8,8] {
  %b = bf16[2,8]{1,0:S(1)} parameter(0)
  ROOT %g2 = bf16[8,8] all-gather(%b), replica_groups=mesh['x'=4], device_ids=([4]) {'x'}, frontend_attributes={chain_id="0"}
}

%all-reduce-scatter.1 (input: f32[16,8]) -> f32[4,8] {
  %input = f32[16,8]{1,0:S(1)} parameter(0)
  %all-reduce.1 = f32[16,8]{1,0} all-reduce(%input), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %part = f32[4,8]{1,0} dynamic-slice(%all-reduce.1, %zero, %zero), dynamic_slice_sizes={4,8}
}

%take (stack: f32[5,4,8], place: s32[]) -> f32[4,8] {
  %stack = f32[5,4,8]{2,1,0} parameter(0)
  %place = s32[] parameter(1)
  %slice = f32[1,4,8]{2,1,0} dynamic-slice(%stack, %place, %place, %place), dynamic_slice_sizes={1,4,8}
  ROOT %reshaped = f32[4,8]{1,0} bitcast(%slice)
}

%body (state.2: (s32[], f32[4,8], f32[5,4,8])) -> (s32[], f32[4,8], f32[5,4,8]) {
  %state.2 = (s32[]{:T(128)}, f32[4,8]{1,0}, f32[5,4,8]{2,1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%state.2), index=0
  %x.2 = f32[4,8]{1,0} get-tuple-element(%state.2), index=1
  %stack.2 = f32[5,4,8]{2,1,0} get-tuple-element(%state.2), index=2
  %taken = f32[4,8]{1,0} fusion(%stack.2, %i.2), kind=kLoop, calls=%take
  %a.2 = bf16[2,8]{1,0:T(8,128)(2,1)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %start = bf16[8,8]{1,0:T(8,128)(2,1)S(1)} fusion(%a.2), kind=kCustom, calls=%gather_start
  %end = bf16[8,8]{1,0:T(8,128)(2,1)S(1)} fusion(%a.2), kind=kCustom, calls=%gather_end
  %init = (s32[], f32[4,8]{1,0}) tuple(%i.2, %taken)
  %while.1 = (s32[], f32[4,8]{1,0}) while(%init), condition=%inner_condition, body=%inner_body
  %y.2 = f32[4,8]{1,0} get-tuple-element(%while.1), index=1
  %wide = f32[16,8]{1,0:S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %scattered = f32[4,8]{1,0:S(1)} fusion(%wide), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %next.2 = (s32[], f32[4,8]{1,0}, f32[5,4,8]{2,1,0}) tuple(%i.2, %y.2, %stack.2)
}

%condition (state.3: (s32[], f32[4,8], f32[5,4,8])) -> pred[] {
  %state.3 = (s32[], f32[4,8]{1,0}, f32[5,4,8]{2,1,0}) parameter(0)
  ROOT %unknown = pred[] custom-call(%state.3), custom_call_target="Something"
}

ENTRY %main (p: f32[4,8], q: f32[5,4,8]) -> f32[4,8] {
  %p = f32[4,8]{1,0} parameter(0)
  %q = f32[5,4,8]{2,1,0} parameter(1)
  %zero.1 = s32[] constant(0)
  %tuple = (s32[], /*index=1*/f32[4,8]{1,0}, f32[5,4,8]{2,1,0}) tuple(%zero.1, %p, %q)
  %while.2 = (s32[], f32[4,8], f32[5,4,8]) while(%tuple), condition=%condition, body=%body, {"known_trip_count":{"n":"5"}}
  %z = f32[4,8]{1,0} get-tuple-element(%while.2), index=1
  %copy-start.1 = (f32[4,8]{1,0:S(1)}, f32[4,8]{1,0}, u32[]{:S(2)}) copy-start(%z)
  %copy-done.1 = f32[4,8]{1,0:S(1)} copy-done(%copy-start.1)
  ROOT %all-reduce.2 = f32[4,8]{1,0} all-reduce(%copy-done.1), replica_groups=mesh['x'=4,'y'=2] {'y'}, to_apply=%add
}
"""


@pytest.fixture(scope="module")
def module():
    computations = hlo.parse(MODULE)
    return computations, hlo.executions(computations)


def test_computations_run_as_often_as_the_loops_around_them_turn(module):
    _, times = module
    assert {name: times[name] for name in ("main", "body", "inner_body", "take", "all-reduce-scatter.1", "add")} == {
        "main": 1,
        "body": 5,
        "inner_body": 15,
        "take": 5,
        "all-reduce-scatter.1": 5,
        "add": 0,
    }


def test_products_in_loops_count_by_turn_and_by_pass(module):
    assert hlo.matrix_flops(*module) == 15 * 2 * 4 * 8 * 8
    assert hlo.matrix_flops(*module, passes=True) == 6 * 15 * 2 * 4 * 8 * 8


def test_traffic_by_kind(module):
    """In bytes that a device sends: a sum takes twice what gathering or keeping a part takes."""
    gathered, scattered, summed = 5 * 8 * 8 * 2 * 3 / 4, 5 * 16 * 8 * 4 * 3 / 4, 4 * 8 * 4 * 2 * 1 / 2
    assert {(row.kind, row.count, row.bytes, row.bytes_outside_loops) for row in hlo.collectives(*module, 8)} == {
        ("reduce-scatter", 5, scattered, 0),
        ("all-gather", 5, gathered, 0),
        ("all-reduce", 1, summed, summed),
    }


def test_memory_traffic_counts_slices_and_leaves_out_what_stays_in_the_unit(module):
    tile = 4 * 8 * 4
    assert hlo.hbm_bytes(*module) == 5 * (2 * tile + 4) + 15 * 2 * tile + tile + tile  # + 4: the number of the slice


@pytest.mark.parametrize("shape", ["conv", "dot"])
def test_compiled_products_agree_with_the_traced_ones(shape):
    """Also in a loop, whose body XLA's own analysis counts once."""

    def turn(x, w):
        if shape == "dot":
            return jnp.tanh(x @ w)
        return jnp.tanh(jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))

    def function(x, w):
        return jax.lax.scan(lambda x, _: (turn(x, w), None), x, length=6)[0]

    sizes = ((16, 32), (32, 32)) if shape == "dot" else ((2, 9, 9, 8), (3, 3, 8, 8))
    arguments = [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]
    computations = hlo.parse(jax.jit(function).lower(*arguments).compile().as_text())
    found = hlo.matrix_flops(computations, hlo.executions(computations))
    assert found == count_flops(function, *arguments) == 6 * count_flops(turn, *arguments) > 0


@pytest.mark.parametrize(
    ("sides", "out", "how", "expected"),
    [
        # Heads as a dimension of the window, which meets data in one place of four.
        (("2,16,8,1", "8,4,6,1"), "2,16,4,6", "{size=1x4 pad=0_0x3_3}, dim_labels=0bf1_i1o0->0b1f", 2 * (2 * 16) * (4 * 6) * 8),
        # A product for each sample and head, one after the other along a dilated dimension.
        (
            ("3,16,4,8", "3,5,4,8"),
            "3,4,16,5",
            "{size=3x4 stride=2x3 lhs_dilate=3x4}, dim_labels=0b1f_0o1i->01bf",
            2 * (3 * 4) * (16 * 5) * 8,
        ),
    ],
)
def test_convolutions_as_libtpu_writes_products(sides, out, how, expected):
    text = f"""
ENTRY %main (x: bf16[{sides[0]}], w: bf16[{sides[1]}]) -> bf16[{out}] {{
  %x = bf16[{sides[0]}]{{3,2,1,0:T(8,128)(2,1)}} parameter(0)
  %w = bf16[{sides[1]}]{{3,2,1,0:T(8,128)(2,1)S(1)}} parameter(1)
  ROOT %y = bf16[{out}]{{3,2,1,0}} convolution(%x, %w), window={how}
}}
"""
    computations = hlo.parse(text)
    assert hlo.matrix_flops(computations, hlo.executions(computations)) == expected


def test_topologies_and_their_errors():
    assert chip_of("v5e:8x8") is CHIPS["v5e"] and chip_of("v5p:4x4x4").axes == 3
    for wrong in ("v5e", "v5e-64", "v5e:8x8x8", "v5p:8x8", "v9:2x2", "v5e:0x2", "v5litepod:8x8", ""):
        with pytest.raises(InputError, match=r"v4:4x4x4, v5e:8x8, v5p:4x4x4, v6e:8x8"):
            chip_of(wrong)
    for chip in CHIPS.values():
        assert chip_of(chip.example) is chip and chip.ici_bandwidth < chip.memory_bandwidth < chip.memory * 1000 < chip.peak


def test_roofline_and_recipe():
    chip = dataclasses.replace(CHIPS["v5e"], peak=100.0, memory_bandwidth=10.0, ici_bandwidth=2.0)
    assert report.roofline(chip, 300, 40, 4) == {"matrix": 3, "memory": 4, "interconnect": 2, "step": 4}
    found = report.recipe(TrainConfig(steps=3600, batch_size=8), tokens=256, step_seconds=24, chips=4)
    assert found == {"steps": 3600, "images": 28_800, "tokens": 7_372_800, "days": 1, "chip_hours": 96}


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("E1 x.cc] Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm. Exceeded", 21.5 * GIB),
        ("Used 512.00M of 1.00G hbm.", 0.5 * GIB),
        ("memory required for HLO temporaries (74.58G) exceeds available HBM (15.75G).", 74.58 * GIB),
        ("something else", None),
    ],
)
def test_what_the_compiler_says_of_memory(message, expected):
    assert compiler.memory_wanted(message) == expected


class Lowered:
    """A program whose compilation is counted and complains as it is told."""

    def __init__(self, complaint):
        self.complaint, self.compilations = complaint, 0

    def as_text(self):
        return "module"

    def compile(self):
        self.compilations += 1
        os.write(2, b"W1 x.cc] [SPMD] Involuntary full rematerialization. of something\nW1 x.cc] noise\n")
        raise jax.errors.JaxRuntimeError(self.complaint)


def test_what_does_not_fit_is_remembered(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "1")
    lowered = Lowered("required for HLO temporaries (74.50G) exceeds available HBM (15.75G)")
    started = []
    for topology in ("v5e:2x2", "v5e:2x2", "v5e:2x4"):
        program = compiler.compile_for(lowered, topology, tmp_path, lambda: started.append(1))
        assert (program.needed, program.hlo) == (74.5 * GIB, None)
        assert program.warnings == ("Involuntary full rematerialization. of something",)
    assert lowered.compilations == len(started) == 2  # of another topology nothing is known
    assert capfd.readouterr().err == ""
    for file in tmp_path.iterdir():
        file.write_bytes(file.read_bytes()[:-20])
    assert compiler.compile_for(lowered, "v5e:2x2", tmp_path, lambda: None) == program
    assert lowered.compilations == 3
    with pytest.raises(InputError, match="the compiler failed: no such thing"):
        compiler.compile_for(Lowered("no such thing"), "v6e:2x2", tmp_path, lambda: None)


def test_words():
    memory = {"parameters": 2.0 * GIB, "frozen": 0.0, "temporaries": 1e6, "total": 20.0 * GIB, "limit": 15.75 * GIB}
    mesh = {"data": 1, "fsdp": 4, "tensor": 1}
    plan = report.Plan("mine", False, "v5e:2x2", 4, mesh, 64, 2, "dots", False, memory, 2e15, 3e15, ["a note"])
    said = report.text(plan)
    assert "DOES NOT FIT: 20.00 GiB of 15.75 GiB" in said and "parameters 2.00 GiB, temporaries 0.95 MiB" in said
    assert "batch 64 in 2 parts, remat dots, 4 chips" in said and "2 PFLOP, and 50% of them again" in said
    assert "notes       a note" in said and "frozen" not in said and "time" not in said
    seconds = report.roofline(CHIPS["v5e"], 197e12, 8.19e9, 2e9)
    found = {
        "seconds": seconds,
        "mfu": 0.25,
        "compiled_flops": 3.3e15,
        "recipe": report.recipe(TrainConfig(steps=86_400, batch_size=64), 256, 1, 4),
    }
    plan = dataclasses.replace(plan, fits=True, **found, collectives=[hlo.Collective("all-reduce", 1200, 2 * GIB, 0)])
    said = report.text(plan)
    for part in ("1.100 of that", "all-reduce: 1,200 calls, each chip sends 2.00 GiB", "at least 1e+03 ms: matrix 1e+03 ms"):
        assert part in said
    assert "86,400 steps, 5.53 M images, 1.42 G tokens: at least 1 days, 96 chip-hours" in said
    header, _, row = report.table([plan]).splitlines()
    assert len(header.split(" | ")) == len(row.split(" | "))
    assert " ".join(row.split()).endswith("| 20.0 of 15.8 | 2 | 2.00 | 1000, 10, 10 | 25% | 1 days, 96 chip-hours |")


def product(flops, sizes, precision="default", dtype="bfloat16", name="here"):
    return Product(flops, sizes, (dtype, dtype), precision, name)


def test_notes_on_products():
    good = product(1000, (1024, 1024, 1024))
    assert report.notes_on_products([good]) == []
    small = product(500, (1024, 1024, 64), name="attention")
    (note,) = report.notes_on_products([good, small, small, product(1, (1024, 1024, 65))])
    assert note.startswith("padding: 33% of") and "33% those of 1024 x 1024 x 64" in note and note.endswith("attention")
    (note,) = report.notes_on_products([good, product(500, (1024, 1024, 1024), "highest", "float32", "lpips")])
    assert "33.3% of the operations (6 passes each, 75% of all passes)" in note and note.endswith("lpips")


def test_notes_on_programs():
    memory = {"parameters": 2.0 * GIB, "optimizer": 4.0 * GIB}
    quiet = functools.partial(report.notes_on_program, memory, 6.1 * GIB, 1.01, [], 10**9)
    assert quiet(fsdp=64) == []
    rows = [hlo.Collective("all-reduce", 9, 3e9, 0), hlo.Collective("all-gather", 9, 3e9, 2e9)]
    notes = report.notes_on_program(memory, 7 * GIB, 1.5, rows, 10**9, fsdp=64)
    assert [note.split(" ")[0] for note in notes] == ["layout:", "replicated", "all-gathers", "all-reduce"]
    assert "1.00 GiB" in notes[0] and "1.50 times" in notes[1]
    assert len(report.notes_on_program(memory, 6 * GIB, 1, rows[:1], 10**9, fsdp=1)) == 0  # plain data parallelism


@pytest.mark.parametrize(
    ("most", "given", "limit", "expected", "asked"),
    [
        ({"none": 512, "dots": 1024, "full": 4096}, (1024, "full"), 9, (1024, "dots"), 4),
        ({"none": 512, "dots": 1024, "full": 4096}, (256, "full"), 9, (512, "none"), 4),
        ({"none": 512, "dots": 1024, "full": 4096}, (2048, "none"), 9, (4096, "full"), 5),
        ({"none": 0, "dots": 0, "full": 96}, (512, "none"), 9, (64, "full"), 6),
        ({"none": 0, "dots": 0, "full": 0}, (512, "none"), 9, None, 7),
        ({"none": 10**9, "dots": 10**9, "full": 10**9}, (512, "none"), 3, (4096, "none"), 4),
        ({"none": 0, "dots": 0, "full": 4096}, (512, "full"), 1, (512, "full"), 2),
    ],
)
def test_search_for_batch_and_remat(most, given, limit, expected, asked):
    calls = []

    def fits(batch_size, remat):
        calls.append((batch_size, remat))
        return batch_size <= most[remat]

    assert planner.find_best(fits, *given, planner.REMATS, smallest=32, limit=limit) == expected
    assert len(calls) == len(set(calls)) == asked <= limit + 1


def test_jobs_on_shapes_alone():
    """Frozen networks come in only where their terms have a weight; memory is that of one device."""
    velocity = VelocityConfig(width=32, layers=1, head_size=16, patch_size=4, repa_layer=0, repa_hidden=8, repa_grid=4)
    model = dataclasses.replace(TOKENIZER.model, image_size=16, encoder_layers=1, velocity=velocity)
    data = dataclasses.replace(TOKENIZER.data, image_size=16)
    mesh = parallel.make_mesh(MeshConfig(2, 4, 1))
    with_features = TokenizerLossConfig(lpips=0.5, repa=0.5)
    for loss, frozen in ((with_features, True), (TokenizerLossConfig(), False)):
        config = dataclasses.replace(TOKENIZER, model=model, data=data, loss=loss, optimizer=OptimizerConfig())
        job = jobs.training_job(Experiment(config), mesh)
        assert (job.memory["frozen"] > 0) == frozen
        assert set(describe(Experiment(config), jnp.float32).frozen) == ({"lpips", "dinov2"} if frozen else set())
    assert job.parameters < job.memory["parameters"] < 4 * job.parameters  # cut over fsdp, but for what is whole
    assert job.memory["optimizer"] > 1.9 * job.memory["parameters"] == 1.9 * job.memory["average"]


def run(capsys, *arguments):
    code = cli.main(["plan", *map(str, arguments)])
    return code, capsys.readouterr()


@pytest.fixture
def on_cpu(monkeypatch, tmp_path):
    """The environment that `dar-jax plan` sets, until the test ends, and an empty cache."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(planner, "cache_folder", lambda: tmp_path / "cache")


def test_errors_in_one_line(capsys, monkeypatch, on_cpu):
    experiment, tokenizer = EXPERIMENTS / "digits_ar.py", EXPERIMENTS / "digits_tokenizer.py"
    devices = jax.devices()
    monkeypatch.setattr(planner, "open_topology", lambda name: devices)
    for arguments, message in (
        (("--topology", "v5e-8"), "no topology 'v5e-8'"),
        (("--topology", "v5e:2x4", "--peak", "nan"), "should be between"),
        (("--topology", "v5e:2x4", "--batch-size", "60"), "multiple of 8"),
        (("--topology", "v5e:2x4", "--mesh.fsdp", "3"), "does not fit the 8 devices"),
        (("--topology", "v5e:2x4", "--sampling"), "pass --tokenizer"),
        (("--topology", "v5e:2x4", "--tokenizer", "nowhere", "--sampling"), "nowhere"),
        (("--topology", "v5e:2x4", "--tokenizer", experiment, "--sampling"), "is of a transformer, not of a tokenizer"),
        (
            ("--topology", "v5e:2x4", "--tokenizer", tokenizer, "--model.vocab-size", "64"),
            "the tokenizer's codebook_size is 128",
        ),
        (
            ("--topology", "v5e:2x4", "--tokenizer", tokenizer, "--sampling", "--model.heads", "3"),
            "a multiple of model.heads 3",
        ),
    ):
        code, said = run(capsys, experiment, *arguments)
        assert code == 2 and message in said.err and said.err.count("\n") == 1 and not said.out
    code, said = run(capsys, tokenizer, "--topology", "v5e:2x4", "--sampling")
    assert code == 2 and "of a tokenizer" in said.err


@pytest.mark.parametrize("sampling, sizes", [(False, "(1, 8, 1)"), (True, "(8, 1, 1)")])
def test_the_mesh_is_that_of_the_real_command(sampling, sizes, monkeypatch):
    """Which for sampling cuts nothing over fsdp."""

    def refuse(experiment, mesh):
        raise InputError(f"made for {tuple(mesh.shape.values())}")

    monkeypatch.setattr(planner, "open_topology", lambda name: jax.devices())
    monkeypatch.setattr(jobs, "sampling_job" if sampling else "training_job", refuse)
    config = dataclasses.replace(TRANSFORMER, mesh=MeshConfig(fsdp=-1))
    with pytest.raises(InputError, match=re.escape(f"made for {sizes}")):
        planner.plan(Experiment(config), "v5e:2x4", sampling=sampling)


def test_says_how_to_get_libtpu(capsys, monkeypatch, on_cpu):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else find_spec(name, *rest))
    code, said = run(capsys, EXPERIMENTS / "digits_ar.py", "--topology", "v5e:2x2")
    assert code == 2 and 'pip install "jax[tpu]"' in said.err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_a_chips_peak_is_that_of_its_device(topology, on_cpu):
    """So that the plan's MFU and that of a run's log are shares of the same."""
    devices = compiler.open_topology(topology)
    assert len(devices) == 4 and PEAKS[devices[0].device_kind] == chip_of(topology).peak


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_real_compilation(capsys, caplog, tmp_path, on_cpu):
    config = dataclasses.asdict(TRANSFORMER.model)
    arguments = ["--topology", "v5e:2x2", "--mesh.data", "2", "--mesh.fsdp", "2", "--model.layers", "2", "--search", "0"]
    arguments += ["--json", tmp_path / "plan.json", "--optimizer.name", "adamw"]  # Muon has products beside the model's
    with caplog.at_level("INFO", logger="dar_jax.plan"):
        code, first = run(capsys, EXPERIMENTS / "digits_ar.py", *arguments)
        assert code == 0, first.err
        assert "compiling" in caplog.text
        caplog.clear()
        assert run(capsys, EXPERIMENTS / "digits_ar.py", *arguments) == (0, first)
        assert not caplog.text  # known already
    (found,) = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] and found["chips"] == 4 and found["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
    assert found["compiled_flops"] == pytest.approx(found["flops"], rel=0.02) and found["flops"] == found["model_flops"]
    assert {row["kind"] for row in found["collectives"]} >= {"all-gather"}
    assert 0 < found["mfu"] < 1 and found["recipe"]["tokens"] == 700 * 64 * config["num_tokens"]
    assert "MFU at most" in first.out and "all-gather" in first.out
