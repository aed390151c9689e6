"""What a comparison says of its figures: advice that follows from them, and when a difference is noise."""

from __future__ import annotations

from regraft.engine.compare.results import Result, advice


def result(name: str, values: list[float], seconds: float, held: int = 500, quarter: float | None = None) -> Result:
    def point(value: float, seed: int, share: float) -> dict:
        figures = {"metrics": {"accuracy": value}, "train_seconds": seconds, "latency_ms": 1.0, "mb": 1.0}
        return {
            "share": share,
            "seed": seed,
            "rows": int(1000 * share),
            "held": held,
            "wall_seconds": seconds,
            **figures,
        }

    points = [point(v, s, 1.0) for s, v in enumerate(values)]
    return Result(name, name, points + ([point(quarter, 0, 0.25)] if quarter is not None else []))


def test_advice_names_the_cheapest_of_those_that_cannot_be_told_apart():
    close = [
        result("cheap", [0.90, 0.905], 1.0),
        result("dear", [0.912, 0.908], 100.0),
        result("poor", [0.5, 0.5], 0.1),
    ]
    said = advice(close, "accuracy", True)
    assert said.startswith("Use cheap: accuracy 90.3")
    assert "noise" in said
    assert "100 times the training time" in said
    quick = [result("quick", [0.912, 0.908], 1.9), result("slow", [0.80, 0.805], 100.0)]
    assert "for 1/50 of its training time" in advice(quick, "accuracy", True)
    clear = [result("cheap", [0.80, 0.805], 1.0), result("dear", [0.912, 0.908], 100.0)]
    assert advice(clear, "accuracy", True).startswith("Use dear: accuracy 91.0")
    assert "10.8 points ahead of cheap" in advice(clear, "accuracy", True)


def test_a_difference_that_few_rows_cannot_show_is_called_noise():
    few = [result("cheap", [0.80], 1.0, held=50), result("dear", [0.86], 100.0, held=50)]
    many = [result("cheap", [0.80], 1.0, held=50_000), result("dear", [0.86], 100.0, held=50_000)]
    assert advice(few, "accuracy", True).startswith("Use cheap")
    assert advice(many, "accuracy", True).startswith("Use dear")


def test_advice_says_whether_more_rows_would_help_and_knows_that_errors_should_be_small():
    assert "more labelled rows would help (4 times the rows brought +8.0" in advice(
        [result("a", [0.9], 1.0, quarter=0.82)], "accuracy", True
    )
    assert "more rows would bring little" in advice([result("a", [0.9], 1.0, quarter=0.898)], "accuracy", True)
    alone = result("a", [0.9], 1.0)
    alone.points += [p | {"share": 0.01} for p in result("a", [0.3], 1.0).points]
    assert advice([alone], "accuracy", True).endswith(
        "the only way that was measured."
    )  # a hundred times the rows: of course
    worse, better = result("a", [0.9], 1.0), result("b", [0.2], 1.0)
    for r in (worse, better):
        for p in r.points:
            p["metrics"] = {"mse": p["metrics"]["accuracy"]}
    assert advice([worse, better], "mse", False).startswith("Use b")
    assert "longer one with --budget" in advice([Result("a", "a")], "accuracy", True)


def named(metric: str, *ways: Result) -> list[Result]:
    """The same figures as those of another metric."""
    for way in ways:
        for point in way.points:
            point["metrics"] = {metric: point["metrics"]["accuracy"]}
    return list(ways)


def in_folds(way: Result) -> Result:
    way.folds = True
    return way


def test_folds_hold_out_other_rows_each_and_count_together():
    values = [0.93, 0.934, 0.926, 0.93, 0.93]
    cheap, dear = result("cheap", [v - 0.03 for v in values], 1.0, held=200), result("dear", values, 100.0, held=200)
    assert advice([cheap, dear], "accuracy", True).startswith("Use cheap")  # five seeds on the same 200 rows
    assert advice([in_folds(cheap), in_folds(dear)], "accuracy", True).startswith("Use dear")  # 1,000 rows
    close = [in_folds(result("a", [0.9, 0.9], 1.0)), in_folds(result("b", [0.91, 0.91], 9.0))]
    assert "noise on 1,000 held-out rows and 2 folds" in advice(close, "accuracy", True)


def test_a_figure_that_is_no_share_of_rows_needs_several_seeds_to_be_told_from_noise():
    one = advice(named("pearson", result("majority", [0.0], 0.1), result("full", [-0.339], 9.0)), "pearson", True)
    assert "33.9 points ahead of full" in one
    assert "cannot be told from one seed of pearson" in one
    assert "noise:" not in one
    same = advice(named("macro_f1", result("a", [0.8] * 3, 0.1), result("b", [0.81] * 3, 9.0)), "macro_f1", True)
    assert same.startswith("Use b") and "cannot be told from seeds that all give the same macro_f1: --folds" in same
    constant = result("majority", [0.1], 0.1)
    constant.seeded = False
    spread = advice(named("macro_f1", constant, result("b", [0.8, 0.82, 0.81], 9.0)), "macro_f1", True)
    assert spread.startswith("Use b") and "(noise: 1.2 points)" in spread


def test_errors_are_said_as_they_are_and_not_as_points_of_a_hundred():
    worse, better = result("a", [20.8, 20.6], 1.0), result("b", [9.5, 9.7], 2.0, quarter=12.0)
    said = advice(named("mae", worse, better), "mae", False)
    assert said.startswith("Use b: mae 9.6 ± 0.1414, 11.1 ahead of a (noise: 0.283)")
    assert "more labelled rows would help (4 times the rows brought -2.4)" in said
    assert "points" not in said


def test_the_page_draws_every_ways_spread():
    from regraft.engine.compare.spread import spread_chart

    ways = [result("one <b>", [0.8, 0.9], 1.0), result("two", [0.5], 1.0), Result("three", "three")]
    drawn = spread_chart(ways, "accuracy")
    assert drawn.count('class="dot c1"') == 2
    assert drawn.count('class="line c1"') == 1  # one seed has no spread
    assert "one &lt;b&gt;: 0.8500 ± 0.0707" in drawn
    assert "three" not in drawn
    assert spread_chart([Result("a", "a")], "accuracy") is None
