"""The benchmarks themselves: timing on a fake clock, memory of a known call, agreement of all contenders."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from functools import partial

import pytest
import torch

import deepsim_ext
from benchmarks import (
    bench_all_pairs,
    bench_batch_hard,
    bench_given_rows,
    bench_style,
    bench_verification,
    check,
    hardness,
    instructions,
    memory,
    readme,
    run,
    scaling,
    timing,
)
from benchmarks.environment import environment
from benchmarks.report import Bar
from benchmarks.timing import Contender, Inputs, relative_errors, value_and_gradients


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def loss(leaves: list[torch.Tensor], constants: list[torch.Tensor]) -> torch.Tensor:
    return (leaves[0] * constants[0]).sum()


def sample() -> Inputs:
    return Inputs([torch.randn(4)], [torch.randn(4)])


EXACT = Contender("exact", loss)


def timed(name: str, clock: FakeClock, seconds: list[float], calls: list[str], **options) -> Contender:
    """A contender whose calls take `seconds` in turn on the fake clock."""
    remaining = iter(seconds)

    def function(leaves, constants):
        calls.append(name)
        clock.now += next(remaining)
        return loss(leaves, constants)

    return Contender(name, function, **options)


def test_summary_is_in_milliseconds():
    record = timing.summary([0.001 * t for t in range(1, 12)])
    assert record["runs"] == 11
    assert record["p20_ms"] == pytest.approx(3)
    assert record["p50_ms"] == pytest.approx(6)
    assert record["p80_ms"] == pytest.approx(9)


def test_measure_leaves_out_warm_up_and_interleaves():
    clock, calls = FakeClock(), []
    # Two warm-up calls each, which must not be in the figures; the second gives the number of runs.
    contenders = [
        timed("a", clock, [100, 1, 1, 2, 3, 4], calls),
        timed("b", clock, [100, 2, 5, 7], calls, min_runs=1),
    ]
    records = timing.measure(contenders, sample, EXACT, seconds=4.0, max_runs=4, clock=clock)

    assert calls[:4] == ["a", "a", "b", "b"]
    # b has 2 of the 4 rounds, and every other round runs backwards
    assert calls[4:] == ["a", "b", "a", "a", "b", "a"]
    forward = {r["contender"]: r for r in records if r["phase"] == "forward"}
    assert (forward["a"]["runs"], forward["b"]["runs"]) == (4, 2)
    assert forward["a"]["p50_ms"] == pytest.approx(2500)
    assert forward["b"]["p50_ms"] == pytest.approx(6000)
    assert all(r["valid"] and r["gradient_error"] < 1e-6 for r in records)


def test_forward_and_backward_are_split():
    clock = FakeClock()

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            clock.now += 2
            return x.sum()

        @staticmethod
        def backward(ctx, grad_output):
            clock.now += 5
            return grad_output.expand(4)

    contender = Contender("slow", lambda leaves, _: Slow.apply(leaves[0]))
    assert timing.run_once(contender, sample(), clock) == {"forward": 2, "backward": 5, "both": 7}


def test_runs_are_spread_evenly():
    assert [timing.takes_part(i, 3, 9) for i in range(9)] == [False, False, True] * 3
    assert all(timing.takes_part(i, 9, 9) for i in range(9))
    assert not any(timing.takes_part(i, 0, 9) for i in range(9))


def test_every_contender_leaves_a_record():
    clock = FakeClock()

    def fails(leaves, constants):
        raise RuntimeError("no kernel\nmore lines")

    contenders = [
        Contender("skipped", loss, skip="does not fit"),
        Contender("failing", fails),
        timed("slow", clock, [1, 30], []),
        Contender("wrong", lambda leaves, constants: 2 * loss(leaves, constants)),
        Contender("nan", lambda leaves, constants: torch.nan * loss(leaves, constants)),
    ]
    records = {r["contender"]: r for r in timing.measure(contenders, sample, EXACT, max_runs=5, clock=clock)}
    assert records["skipped"]["skipped"] == "does not fit"
    assert records["failing"]["skipped"] == "failed with RuntimeError: no kernel"
    assert records["slow"]["skipped"] == "one step takes 30 s, the limit is 10 s"
    assert records["wrong"]["valid"] is False and records["wrong"]["value_error"] == pytest.approx(
        1, rel=1e-3
    )
    assert records["nan"]["valid"] is False and records["nan"]["value_error"] is None


def test_rates():
    def record(contender: str, phase: str, p50: float) -> timing.Record:
        return {"contender": contender, "phase": phase, "p50_ms": p50}

    records = [record("mm", "forward", 2.0), record("eager", "both", 12.0), record("ours", "both", 1.0)]
    timing.add_rates(records, {"forward": 10**9, "both": 2 * 10**9}, product="mm", baseline="eager")
    product, _, ours = records
    assert product["gflops"] == pytest.approx(500) and "speedup" not in product
    assert ours["gflops"] == pytest.approx(2000)
    assert ours["product_ratio"] == pytest.approx(0.5)
    assert ours["speedup"] == pytest.approx(12)


def test_does_not_fit():
    assert timing.does_not_fit(1) == ""
    assert timing.does_not_fit(2**60).startswith("needs about 1073741824.0 GiB, ")


def test_bars():
    assert Bar("", 0.6, at_most=0.65).status == "pass"
    assert Bar("", 0.7, at_most=0.65).status == "MISS"
    assert Bar("", 12.5, at_least=12).status == "pass"
    assert Bar("", None, at_least=12).status == "not measured"


def differentiable(contenders: list[Contender]) -> list:
    """Parameters for the contenders that have a gradient; the compiler makes its own slow."""
    return [
        pytest.param(c, id=c.name, marks=[pytest.mark.slow] if c.name == "torch.compile" else [])
        for c in contenders
        if c.differentiable
    ]


@pytest.mark.parametrize(
    "contender", differentiable([*bench_batch_hard.contenders(32, torch.float64), bench_batch_hard.EXACT])
)
@pytest.mark.parametrize(
    "labels", [[i // 4 for i in range(32)], [0] * 20 + [1] * 11 + [2]], ids=["balanced", "not"]
)
def test_batch_hard_contenders_agree(contender, labels):
    if contender.skip:
        pytest.skip(contender.skip)
    inputs = Inputs([torch.randn(32, 8, dtype=torch.float64)], [torch.tensor(labels)[torch.randperm(32)]])
    reference = Contender("", lambda xs, ys: deepsim_ext.reference.batch_hard_triplet_loss(xs[0], ys[0]))
    errors = relative_errors(value_and_gradients(contender, inputs), value_and_gradients(reference, inputs))
    assert max(errors) < 1e-9


@pytest.mark.parametrize("loss", bench_all_pairs.OURS)
def test_all_pairs_contenders_agree(loss):
    drawn = bench_all_pairs.draw(32)
    inputs = Inputs([drawn.leaves[0].double()], drawn.constants)
    ours = bench_all_pairs.OURS[loss]
    exact = partial(getattr(deepsim_ext.reference, ours.func.__name__), **ours.keywords)
    reference = value_and_gradients(Contender("", lambda xs, ys: exact(xs[0], ys[0])), inputs)
    contenders = [c for c in bench_all_pairs.contenders(loss, 32) if c.differentiable and not c.skip]
    assert len(contenders) >= 3
    for contender in contenders:
        assert max(relative_errors(value_and_gradients(contender, inputs), reference)) < 1e-6, contender.name


@pytest.mark.parametrize("loss", bench_given_rows.LOSSES)
def test_given_rows_contenders_agree(loss):
    drawn = bench_given_rows.draw(loss, 40)
    inputs = Inputs(*([t.double() for t in part] for part in drawn))
    ours, eager, _ = (value_and_gradients(c, inputs) for c in bench_given_rows.contenders(loss))
    assert max(relative_errors(ours, eager)) < 2e-5  # torch's own Euclidean distance adds 1e-6


def test_neighbours_of_the_benchmark_agree():
    records = bench_all_pairs.neighbors_case(60, 5, 0.0)
    assert {r["contender"] for r in records if r.get("valid")} == {
        "deepsim_ext",
        "torch eager",
        "faiss IndexFlatL2",
    }


@pytest.mark.parametrize("contender", differentiable(bench_style.contenders()))
def test_style_contenders_agree(contender):
    drawn = bench_style.draw([(1, 6, 5, 4), (1, 3, 7, 7)])
    # Targets in float32 are symmetric to rounding only; a backward of one product relies on symmetry.
    targets = [(target + target.mT).double() / 2 for target in drawn.constants]
    inputs = Inputs([features.double() for features in drawn.leaves], targets)
    reference = Contender("", deepsim_ext.reference.style_loss)
    errors = relative_errors(value_and_gradients(contender, inputs), value_and_gradients(reference, inputs))
    assert max(errors) < 1e-9


ALLOCATING_PROBE = "tests.test_benchmarks:allocating_probe"


def allocating_probe(mebibytes: str):
    """A probe of memory.py: fills that much memory."""
    elements = int(mebibytes) * 2**20 // 4
    return lambda: torch.ones(elements), lambda: torch.ones(1)


@pytest.mark.slow
def test_memory_of_a_known_allocation():
    peak = memory.peak_in_subprocess(ALLOCATING_PROBE, 128)
    assert peak == pytest.approx(128 * 2**20, rel=0.1)


@pytest.mark.slow
def test_memory_of_a_failing_probe_is_recorded():
    record = memory.memory_record(EXACT, 0, ALLOCATING_PROBE, "much")
    assert record["skipped"].startswith("failed with") and "ValueError" in record["skipped"]


@pytest.mark.slow
def test_quick_run_writes_results(tmp_path, capsys):
    assert run.main(["--quick", "--only", "batch_hard", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "cpu-quick-batch_hard.json").read_text(), parse_constant=pytest.fail)
    assert result["environment"]["torch"] == torch.__version__
    times = [r for r in result["records"] if r["kind"] == "time" and "p50_ms" in r]
    assert {r["contender"] for r in times} >= {"deepsim_ext", "torch eager", "torch row-chunked"}
    assert all(r["p20_ms"] <= r["p50_ms"] <= r["p80_ms"] and r["runs"] >= 5 for r in times)
    compiled = [r for r in result["records"] if r["contender"] == "torch.compile"]
    assert compiled and all(r["skipped"] == "left out by --quick" for r in compiled)
    table = (tmp_path / "cpu-quick-batch_hard.md").read_text()
    assert "| N=1024 D=128 float32 | deepsim_ext |" in table
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "cpu-quick-batch_hard_time.png",
        "cpu-quick-batch_hard_memory.png",
    }


def test_the_protocol_counted_and_looped():
    (rows,), (same,) = bench_verification.draw(200)
    found = bench_verification.counted(rows, same)
    assert found == pytest.approx(bench_verification.looped(rows, same), rel=1e-12)
    assert 0.5 < found[0] < 1


def test_the_figures_in_the_readme_are_those_of_the_record():
    text = readme.README.read_text()
    assert readme.with_figures(text) == text
    for op in run.BENCHES:
        result = json.loads((readme.RESULTS / f"cpu-{op}.json").read_text())
        assert result["bars"] and all(bar["status"] != "not measured" for bar in result["bars"])


def test_the_readme_shows_the_worst():
    record = {"case": "c", "error": 1.0, "gradient_error": 2.0}
    worse = record | {"what": "b", "error": "inf", "gradient_error": "nan"}
    choices = {"case": "c", "what": "d", "error": 9.0, "choices": 8, "not_best": 5, "wrong": 3}
    records = [r | {"library": name} for name in hardness.LIBRARIES for r in (worse, record, choices)]
    assert "| c | inf | nan | 5, 3 of 8 |" in readme.hardness_section({"records": records})


def test_hard_inputs_are_computed_right():
    result = json.loads(hardness.RESULT.read_text(), parse_constant=pytest.fail)
    cases = hardness.cases()
    ours = [r for r in result["records"] if r["library"] == hardness.OURS]
    assert len(ours) == len(cases) * (len(hardness.LOSSES) + 2)
    for record in ours:
        dtype = cases[record["case"]].embeddings.dtype
        limit = 1e-5 if dtype is torch.float32 else torch.finfo(dtype).eps / 2
        if record["case"] == "half of the classes 1e4 away":
            limit = 1e-3
        errors = [record[key] for key in ("error", "gradient_error") if key in record]
        assert all(0 <= error <= limit for error in errors), record
        assert record.get("wrong", 0) == 0


def test_hardness_of_small_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(hardness, "N", 48)
    hardness.main(["--output", str(tmp_path)])
    records = json.loads((tmp_path / "hardness.json").read_text(), parse_constant=pytest.fail)["records"]
    assert {r["library"] for r in records} == set(hardness.LIBRARIES)
    text = (tmp_path / "hardness.md").read_text()
    assert text.count("| deepsim_ext |") == sum(r["library"] == hardness.OURS for r in records)
    kept = {
        (r["case"], r["what"], r["library"]): r for r in json.loads(hardness.RESULT.read_text())["records"]
    }
    assert kept.keys() == {(r["case"], r["what"], r["library"]) for r in records}


def baseline_of(tmp_path, **different: object):
    """Records of this machine, but for what is different, in which every case takes one product."""
    for op in {op for op, _ in check.CASES}:
        records = [
            {"case": case, "contender": "deepsim_ext", "phase": "both", "product_ratio": 1.0}
            for o, case in check.CASES
            if o == op
        ]
        result = {"environment": environment() | different, "records": records}
        (tmp_path / f"cpu-{op}.json").write_text(json.dumps(result))
    return ["--baselines", str(tmp_path)]


def measured_in_turn(monkeypatch: pytest.MonkeyPatch, *ratios: float) -> None:
    """Gives every case of check.py the same ratios."""
    for case in check.CASES:
        monkeypatch.setitem(check.CASES, case, partial(next, iter(ratios)))


@pytest.mark.parametrize(
    ("ratios", "code"), [((1.14,), 0), ((1.3, 1.2, 1.1), 0), ((1.16, 1.3, 1.2), 1), ((0.5,), 0)]
)
def test_bench_check_tells_a_loss_from_noise(tmp_path, monkeypatch, capsys, ratios, code):
    measured_in_turn(monkeypatch, *ratios)
    assert check.main(baseline_of(tmp_path)) == code
    assert capsys.readouterr().out.count("SLOWER") == code * len(check.CASES)


def test_bench_check_does_not_compare_machines(tmp_path, capsys):
    assert check.main(baseline_of(tmp_path, cpu="another")) == 2
    assert "cpu 'another', here" in capsys.readouterr().out


def test_bench_check_measures_ratios_that_the_record_has():
    for op, case in check.CASES:
        record = json.loads((check.BASELINES / f"cpu-{op}.json").read_text())
        assert check.recorded_ratios(record)[case] > 0
    assert 0 < check.batch_hard(64, 8) < float("inf")
    assert 0 < check.style(16, bench_style.ALL) < float("inf")


def test_scaling_stops_where_a_step_takes_too_long(monkeypatch):
    monkeypatch.setattr(scaling, "LONGEST_STEP", -1.0)

    def point(name, size):
        contender = Contender(name, loss, skip="no room" if (name, size) == ("b", 1) else "")
        return contender, sample, lambda: {"peak_bytes": 7}

    records = list(scaling.points("op", ("a", "b"), [1, 2], point))
    assert [(r["contender"], r["size"], r.get("skipped")) for r in records] == [
        ("a", 1, None),
        ("b", 1, "no room"),
    ]
    assert records[0]["p50_ms"] > 0 and records[0]["peak_bytes"] == 7


def test_scaling_knows_the_contenders():
    for names, point, size in (
        (scaling.BATCH_HARD, scaling.batch_hard_point, 16),
        (scaling.STYLE, scaling.style_point, 4),
    ):
        for name in names:
            contender, draw, _ = point(name, size)
            assert contender.name == name
            if not contender.skip:
                assert timing.run_once(contender, draw())["both"] > 0


@pytest.mark.parametrize("op", run.BENCHES)
def test_the_record_holds_the_bars_that_the_code_has(op):
    record = json.loads((readme.RESULTS / f"cpu-{op}.json").read_text())
    bars = run.BENCHES[op].bars(record["records"])
    assert record["bars"] == [dataclasses.asdict(bar) | {"status": bar.status} for bar in bars]


def test_the_counted_program_fits_the_kernels():
    command = ["g++", "-std=c++17", "-fsyntax-only", "-I.", "benchmarks/instructions.cpp"]
    subprocess.run(command, cwd=memory.ROOT, check=True)
    recorded = json.loads(instructions.RESULT.read_text())
    for what, multiplications in instructions.MULTIPLICATIONS.items():
        per = recorded[what]["instructions"] / multiplications
        assert recorded[what]["per_multiplication"] == round(per, 4)
        assert 1 / 8 < per < 1  # an AVX2 instruction makes at most eight


@pytest.mark.skipif(bool(instructions.missing_tools()), reason="needs g++ and valgrind")
def test_the_kernels_execute_as_many_instructions_as_recorded():
    recorded, counted = json.loads(instructions.RESULT.read_text()), instructions.measure()
    if counted["compiler"] != recorded["compiler"]:
        pytest.skip("counts hold for one compiler")
    for what in instructions.MULTIPLICATIONS:
        assert counted[what]["instructions"] == pytest.approx(recorded[what]["instructions"], rel=0.02)
