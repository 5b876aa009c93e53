"""`profile-mining --simulate`: what it prints is the cost model's, local ranks are measured, bad options."""

from __future__ import annotations

import pytest
import torch

from deepsim_ext.cli import main
from deepsim_ext.distributed.cost_model import MACHINES, Problem, predict, sent
from deepsim_ext.profile_mining import simulate


def table(text: str) -> list[dict[str, str]]:
    head, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    return [dict(zip(head, row, strict=True)) for row in rows]


def simulated(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert main(["profile-mining", "--simulate", *options]) == 0
    return capsys.readouterr().out


def test_the_table_is_that_of_the_model(capsys):
    printed = simulated(
        capsys, "--ranks", "64", "1024", "--rows", "1048576", "--dims", "128", "--dtypes", "bfloat16"
    )
    rows = table(printed)
    assert [row["ranks"] for row in rows] == ["64", "1024"]
    for row in rows:
        problem = Problem(2**20, 128, int(row["ranks"]), 2)
        time = predict(problem, MACHINES["h200-infiniband"])
        assert float(row["predicted ms"]) == pytest.approx(1e3 * time.total, rel=5e-3)
        assert float(row["exposed ms"]) == pytest.approx(1e3 * time.exposed, rel=5e-3)
        assert float(row["MB sent/rank"]) == pytest.approx(sent(problem).total / 1e6, rel=1e-3)
        assert row["measured ms"] == "\N{EN DASH}"
    assert MACHINES["h200-infiniband"].assumptions in printed


def test_figures_given_take_the_place_of_the_machines(capsys):
    options = ["--ranks", "64", "--dims", "128", "--machine", "h200-nvlink"]
    figures = ["--bandwidth", "25", "--latency", "7", "--rate", "3"]
    (row,) = table(simulated(capsys, *options, *figures))
    machine = MACHINES["h200-nvlink"]._replace(bandwidth=25e9, latency=7e-6, rate=3e12)
    expected = predict(Problem(2**20, 128, 64), machine).total
    assert float(row["predicted ms"]) == pytest.approx(1e3 * expected, rel=5e-3)


@pytest.mark.slow
def test_local_ranks_are_measured_too(capsys):
    printed = simulated(
        capsys, "--machine", "local", "--rows", "512", "--dims", "8", "--ranks", "1", "2", "16"
    )
    alone, two, many = table(printed)
    assert alone["measured ms"] == many["measured ms"] == "\N{EN DASH}"
    assert float(two["measured ms"]) > 0
    assert float(two["measured/predicted"]) == pytest.approx(
        float(two["measured ms"]) / float(two["predicted ms"]), rel=0.05
    )
    assert all(float(row["predicted ms"]) > 0 for row in (alone, two, many))


def test_what_is_measured_has_no_sign_of_noise():
    """Rates are those of whole calls: no difference of two times is taken that could be below 0."""
    machine = simulate.local_machine(8, torch.float32)
    assert min(machine.rate, machine.bandwidth, machine.latency, machine.chosen_rate) > 0


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--simulate"], "--simulate needs --ranks"),
        (["--ranks", "4"], "--ranks does not go without --simulate"),
        (["--machine", "local"], "--machine does not go without --simulate"),
        (["--simulate", "--ranks", "2", "--losses", "batch_all"], "--losses does not go with --simulate"),
        (["--simulate", "--ranks", "2", "--trace"], "--trace does not go with --simulate"),
        (["--simulate", "--ranks", "9", "--rows", "8"], "got 9 ranks for 8 rows"),
    ],
)
def test_options_that_do_not_go_together(options, expected, capsys):
    assert main(["profile-mining", *options]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--bandwidth", "0"], ["--latency", "inf"], ["--rate", "-1"]])
def test_figures_must_be_above_zero(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["profile-mining", "--simulate", "--ranks", "2", *options])
    assert "must be a finite number > 0, got" in capsys.readouterr().err
