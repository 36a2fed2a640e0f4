"""What the benchmarks say about what they measured."""

import pytest

from proofs.bench import growth
from proofs.bench.__main__ import Samples, report
from proofs.bench.stage import GET, KINDS, LIST, POST


def samples(**of_the_control: tuple[float, float]) -> Samples:
    """Two rounds, in the second of which the machine took twice as long for everything."""
    costs = {"floor": (1.0, 0.5), "paygate": (1.5, 1.0), "django": (3.0, 0.25)}
    found: Samples = {}
    for kind in KINDS:
        for name, (service, database) in {**costs, "control": of_the_control.get(kind, (1.1, 0.5))}.items():
            found[kind, name] = [(service, database), (2 * service, 2 * database)]
    found[LIST, "paygate"] = [(4.0, 1.0), (6.0, 2.0)]
    return found


def test_the_bench_compares_with_the_floor_and_the_django_app_round_by_round(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert report(samples()) == []
    printed = capsys.readouterr().out
    assert "| POST | 1.50 | 2.25 | 4.50 | 1.50 (1.50–1.50) | 0.50 (0.50–0.50) | 1.10 |" in printed
    assert "| webhook, its database | 0.75 | 1.50 | 0.38 | 2.00 (2.00–2.00) | 4.00 (4.00–4.00) | 1.00 |" in printed
    assert f"| {LIST} | | 5.00 | | | | |\n| {LIST}, its database | | 1.50 | | | | |" in printed


def test_the_bench_is_void_where_the_control_is_far_from_the_floor() -> None:
    assert report(samples(GET=(1.2, 0.5))) == [f"{GET}: the control is at 1.20 of the floor"]
    assert report(samples(POST=(0.8, 0.5))) == [f"{POST}: the control is at 0.80 of the floor"]


def test_growth_misses_its_goal_where_a_cost_grows_that_somebody_would_feel(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = {
        "flat": {10: [5.0, 10.0], 1000: [5.9, 11.0]},
        "dearer": {10: [5.0, 10.0], 1000: [6.5, 13.0]},
        "nothing": {10: [0.01], 1000: [0.09]},
    }
    assert growth.report(found, [10, 1000]) == ["dearer: 1.30 times, the goal is 1.2"]
    assert "| dearer | 7.500 | 9.750 | 1.30 |" in capsys.readouterr().out


@pytest.mark.parametrize(("large", "missed"), [(2300.0, 0), (2301.0, 1)])
def test_growth_misses_its_goal_where_a_paid_payment_takes_too_much_disk(large: float, missed: int) -> None:
    assert len(growth.report({growth.DISK: {10: [2300.0], 1000: [large]}}, [10, 1000])) == missed
