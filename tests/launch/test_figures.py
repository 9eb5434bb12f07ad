"""Pictures of sweeps: what is plotted is what the runs measured, and nothing is left unsaid."""

import itertools
import math

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from PIL import Image

from marginface.launch import figures
from marginface.report.study import sweep_plots
from marginface.report.study.rows import to_csv

T95 = {2: 12.706204736432095, 3: 4.302652729911275}  # t_{n−1}(0.975), from a table
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_row(experiment="arcface", seed=0, accuracy=0.9, overrides="", status="done", **more):
    """A row as `gather` gives it; a run that is not done has no figures."""
    row = {"experiment": experiment, "variant": "data=small", "overrides": overrides}
    row |= {"seed": seed, "status": status, "commit": COMMIT, "config_hash": "c"}
    row |= {
        "setting_hash": f"{experiment} {overrides}",
        "device": "1 x cpu",
        "versions": "jax 0.10",
    }
    measured = {"synthetic/accuracy": accuracy, "prototypes/sep_mean": 0.4}
    measured |= {"synthetic/eer": 1 - accuracy, "time/examples_per_s": 900.0}
    return row | ((measured | more) if status == "done" else {})


def words(m, dim, lam):
    return f"loss.margin_kw.m={m} model.embedding_dim={dim} regularizers.exclusive.weight={lam}"


def make_grid(ms=(0.3, 0.4), dims=(128, 512), lams=(0, 0.1, 1, 10), seeds=3, experiment="arcface"):
    chance = np.random.default_rng(0)
    return [
        make_row(experiment, seed, round(float(chance.uniform(0.8, 0.95)), 4), words(*at))
        for *at, seed in itertools.product(ms, dims, lams, range(seeds))
    ]


def slow(rows, **at):
    """Mean and half width of the accuracy in percent of the rows with these overrides."""
    wanted = words(**at)
    values = [100 * r["synthetic/accuracy"] for r in rows if r["overrides"] == wanted]
    n, mean = len(values), sum(values) / len(values)
    sd = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, T95[n] * sd / math.sqrt(n)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, by file name."""
    found, save = {}, sweep_plots.save

    def keep(figure, path):
        found[path.stem] = figure
        save(figure, path)

    monkeypatch.setattr(sweep_plots, "save", keep)
    return found


def texts(axes):
    return [text.get_text() for text in axes.texts]


# Lines


def test_lines_have_the_means_and_bands_of_the_seeds(drawn, tmp_path):
    rows = make_grid()
    pictures, _ = figures.draw(rows, tmp_path, only=["lines"])
    assert sorted(drawn) == ["lines_dim", "lines_lambda", "lines_m"]
    for picture in pictures:
        assert "bands are of each mean, not of differences" in picture.caption
        assert "paired" not in picture.caption
    panels = drawn["lines_lambda"].axes
    assert [axes.get_title(loc="left") for axes in panels] == ["dim = 128", "dim = 512"]
    for axes, dim in zip(panels, (128, 512), strict=True):
        lines = {line.get_label(): line for line in axes.lines}
        bands = [c for c in axes.collections if isinstance(c, PolyCollection)]
        assert len(bands) == 2
        for m, band in zip((0.3, 0.4), bands, strict=True):
            expected = [slow(rows, m=m, dim=dim, lam=lam) for lam in (0, 0.1, 1, 10)]
            mean, half = np.array(expected).T
            x, y = lines[f"m = {m}"].get_data()
            np.testing.assert_allclose(x, [0, 0.1, 1, 10])
            np.testing.assert_allclose(y, mean, rtol=1e-9)
            corners = band.get_paths()[0].vertices
            for at, low, high in zip(x, mean - half, mean + half, strict=True):
                own = corners[corners[:, 0] == at, 1]
                np.testing.assert_allclose([own.min(), own.max()], [low, high], rtol=1e-9)


def test_decades_are_logarithmic_and_zero_has_its_place(drawn, tmp_path):
    figures.draw(make_grid(), tmp_path, only=["lines"])
    axes = drawn["lines_lambda"].axes[0]
    assert axes.get_xscale() == "symlog"
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "0.1", "1", "10"]
    places = axes.transData.transform([(x, 90) for x in (0, 0.1, 1, 10)])[:, 0]
    assert np.diff(places).min() > 0.5 * np.diff(places).max()
    assert drawn["lines_dim"].axes[0].get_xscale() == "linear"
    assert sweep_plots.scale_of((0.01, 0.1, 10.0))[0] == "log"
    assert sweep_plots.scale_of((-1.0, 0.1, 10.0))[0] == "linear"
    assert sweep_plots.scale_of((0.0, 1.0))[0] == "linear"


def test_a_setting_without_runs_leaves_a_gap_and_one_with_fewer_seeds_is_hollow(drawn, tmp_path):
    rows = make_grid(ms=(0.3,), dims=(128,))
    for row in rows:
        if row["overrides"].endswith("weight=1"):
            row["status"] = "not run"
    rows[0]["status"] = "interrupted: stopped after step 40"
    (picture,), _ = figures.draw(rows, tmp_path, only=["lines"])
    line, hollow = drawn["lines_lambda"].axes[0].lines[:2]
    y = line.get_ydata()
    assert np.isnan(y).tolist() == [False, False, True, False]
    assert hollow.get_xdata().tolist() == [0]
    assert y[0] == pytest.approx(100 * np.mean([r["synthetic/accuracy"] for r in rows[1:3]]))
    assert "4 runs not complete" in picture.caption
    assert "n = 2 to 3" in picture.caption
    assert "hollow" in picture.caption


def test_one_seed_has_no_band_and_the_caption_says_so(drawn, tmp_path):
    pictures, _ = figures.draw(make_grid(seeds=1), tmp_path, only=["lines", "forest"])
    assert all("n = 1 each, so no intervals" in picture.caption for picture in pictures)
    for axes in drawn["lines_m"].axes:
        bands = [c for c in axes.collections if isinstance(c, PolyCollection)]
        assert all(not len(path.vertices) for band in bands for path in band.get_paths())


def test_experiments_are_lines_where_nothing_else_varies(drawn, tmp_path):
    rows = [
        make_row(experiment, 0, 0.9, f"model.embedding_dim={dim}")
        for experiment in ("softmax", "normface")
        for dim in (128, 256)
    ]
    figures.draw(rows, tmp_path, only=["lines"])
    labels = drawn["lines_dim"].axes[0].get_legend_handles_labels()[1]
    assert labels == ["normface", "softmax"]


def test_settings_that_share_no_line_are_points(drawn, tmp_path):
    chance = np.random.default_rng(1)
    rows = [make_row("arcface", 0, 0.9, words(*chance.uniform(0.1, 1, 3))) for _ in range(12)]
    pictures, reasons = figures.draw(rows, tmp_path)
    points = next(p for p in pictures if p.path.stem == "lines_m")
    assert "each point a setting" in points.caption
    (line,) = drawn["lines_m"].axes[0].lines
    assert line.get_linestyle() == "None"
    assert len(line.get_xdata()) == 12
    assert len(drawn["lines_m"].axes[0].get_xticks()) <= 8
    assert reasons == ["heat_maps: what was run fills no grid of at most four axes"]


def test_names_that_are_taken_are_told_apart(tmp_path):
    rows = [
        *(make_row("arcface", 0, 0.9, f"loss.margin_kw.m={m}") for m in (0.1, 0.2)),
        *(make_row("arcface", 0, 0.9, f"a.b={b} loss.margin_kw.m=0.{b}") for b in (3, 4)),
    ]
    pictures, _ = figures.draw(rows, tmp_path, only=["lines"])
    assert sorted(p.path.stem for p in pictures) == [
        *("lines_b_arcface", "lines_m_arcface", "lines_m_arcface_2")
    ]


# Heat maps and parallel coordinates


def test_cells_say_mean_and_half_width_or_not_run(drawn, tmp_path):
    rows = make_grid()
    gone = [r for r in rows if r["overrides"] != words(0.4, 512, 10)]
    for row in gone:
        if row["overrides"] == words(0.3, 512, 10):
            row["status"] = "failed: exit 3"
    figures.draw(gone, tmp_path, only=["heat_maps"])
    first, second, _ = drawn["heat_maps"].axes
    assert first.get_title(loc="left") == "dim = 128"
    assert (first.get_xlabel(), first.get_ylabel()) == ("λ", "m")
    for i, (m, lam) in enumerate(itertools.product((0.3, 0.4), (0, 0.1, 1, 10))):
        mean, half = slow(rows, m=m, dim=128, lam=lam)
        assert texts(first)[i] == f"{mean:.2f}\n± {half:.2f}"
        assert first.images[0].get_array()[divmod(i, 4)] == pytest.approx(mean)
    assert texts(second)[3] == "failed"
    assert texts(second)[7] == "not run"
    assert second.images[0].get_array().mask.sum() == 2


def test_curves_pass_the_values_of_their_settings(drawn, tmp_path):
    rows = make_grid(seeds=2)
    figures.draw(rows, tmp_path, only=["parallel"])
    (axes,) = drawn["parallel"].axes
    curves = [line for line in axes.lines if len(line.get_xdata()) > 2]
    assert len(curves) == 2 * 2 * 4
    ends = np.array([line.get_ydata()[-1] for line in curves])
    means = sorted(
        slow(rows, m=m, dim=d, lam=la)[0]
        for m, d, la in itertools.product((0.3, 0.4), (128, 512), (0, 0.1, 1, 10))
    )
    expected = (np.array(means) - means[0]) / (means[-1] - means[0])
    np.testing.assert_allclose(ends, expected, atol=1e-9)
    starts = np.array([line.get_ydata()[0] for line in curves])
    assert (starts < 0.5).sum() == (starts > 0.5).sum() == 8  # m = 0.3 below, 0.4 above
    assert len(np.unique(starts)) == len(starts)


# Beside another figure


def test_the_pareto_front_is_what_no_point_beats():
    chance = np.random.default_rng(2)
    x, y = chance.integers(0, 6, (2, 40)).astype(float)
    for less in itertools.product((False, True), repeat=2):
        signs = [-1 if down else 1 for down in less]
        points = [(signs[0] * a, signs[1] * b) for a, b in zip(x, y, strict=True)]
        slowly = [not any(o != p and o[0] >= p[0] and o[1] >= p[1] for o in points) for p in points]
        assert sweep_plots.pareto_front(x, y, less=less).tolist() == slowly


def make_experiments(count, seeds):
    chance = np.random.default_rng(3)
    return [
        make_row(
            f"experiment_{i}",
            seed,
            0.9 + 0.001 * i + float(chance.normal(0, 0.004)),
            **{"prototypes/sep_mean": 0.3 + 0.4 * float(chance.beta(1, 3))},
        )
        for i in range(count)
        for seed in range(seeds)
    ]


@pytest.mark.parametrize("count", [13, 35])
def test_names_beside_points_cover_neither_names_nor_points(drawn, tmp_path, count):
    figures.draw(make_experiments(count, 3), tmp_path, only=["pareto", "speed"])
    figure = drawn["pareto"]
    axes, renderer = figure.axes[0], figure.canvas.get_renderer()
    figure.draw_without_rendering()
    boxes = [text.get_window_extent(renderer) for text in axes.texts]
    assert len(boxes) >= 0.8 * count
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    points = np.concatenate(
        [
            axes.transData.transform(line.get_xydata())
            for line in axes.lines
            if len(line.get_xdata()) and line.get_marker() == "o"
        ]
    )
    assert len(points) == count
    assert not any(box.contains(*point) for box in boxes for point in points)
    assert all(axes.bbox.contains(*corner) for box in boxes for corner in box.corners())


def test_settings_without_prototypes_are_counted(tmp_path):
    rows = make_experiments(3, 2)
    for row in rows[:2]:
        del row["prototypes/sep_mean"]
    pictures, _ = figures.draw(rows, tmp_path, only=["pareto"])
    assert "1 setting without prototypes/sep_mean" in pictures[0].caption
    assert "2 settings, seeds 0 1, n = 2 each" in pictures[0].caption


def test_runs_that_trained_together_have_no_speed_of_their_own(tmp_path):
    rows = make_experiments(3, 2)
    for row in rows[:2]:
        row["time/together"] = 2.0
    pictures, _ = figures.draw(rows, tmp_path, only=["speed"])
    assert "1 setting left out: trained together." in pictures[0].caption
    assert "without time/examples_per_s" not in pictures[0].caption
    assert "2 settings, seeds 0 1, n = 2 each" in pictures[0].caption
    assert "device 1 x cpu; commit 0123456." in pictures[0].caption
    for row in rows[:2]:
        row["time/together"] = 1.0  # one alone has all of its time
    del rows[-1]["time/examples_per_s"], rows[-2]["time/examples_per_s"]
    pictures, _ = figures.draw(rows, tmp_path, only=["speed"])
    assert "together" not in pictures[0].caption
    assert "1 setting without time/examples_per_s" in pictures[0].caption


def test_a_figure_that_is_not_finite_leaves_the_others_of_its_run(tmp_path):
    rows = make_experiments(3, 2)
    for row in rows[:2]:
        row["status"] = "done: not finite: loss/total"
    pictures, _ = figures.draw(rows, tmp_path, only=["pareto", "speed"])
    assert all("3 settings, seeds 0 1, n = 2 each" in p.caption for p in pictures)
    assert all("means only are compared" in p.caption for p in pictures)


# All settings


def test_the_forest_is_sorted_and_has_the_baseline(drawn, tmp_path):
    accuracies = {
        "center": (0.92, 0.9221, 0.9242),
        "arcface": (0.9, 0.902, 0.904),
        "softmax": (0.88, 0.8819, 0.884),
        "ring": (0.9003, 0.9021, 0.904),
    }
    rows = [make_row(n, s, a) for n, three in accuracies.items() for s, a in enumerate(three)]
    (picture,), _ = figures.draw(rows, tmp_path, baseline="arcface", only=["forest"])
    axes, right = drawn["forest"].axes
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names[0] == "center"
    assert names[-1] == "softmax"
    for name, text in zip(names, right.get_yticklabels(), strict=True):
        values = [100 * r["synthetic/accuracy"] for r in rows if r["experiment"] == name]
        half = T95[3] * np.std(values, ddof=1) / math.sqrt(3)
        assert text.get_text() == f"{np.mean(values):.2f} ± {half:.2f}"
    base = np.mean([100 * r["synthetic/accuracy"] for r in rows if r["experiment"] == "arcface"])
    dashed = [
        line for line in axes.lines if line.get_linestyle() == "--" and line.get_xydata().size
    ]
    assert dashed[0].get_xdata()[0] == pytest.approx(base)
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["baseline: arcface", "no difference shown", "better", "worse"]
    assert "Holm over 3 tests" in picture.caption


def marker_of(axes, place):
    """The mean's marker in a row of the forest, counted from below."""
    (found,) = [x for x in axes.lines if x.get_marker() == "o" and list(x.get_ydata()) == [place]]
    return found


def test_the_forest_tells_what_was_not_tested_and_leaves_the_baseline_plain(drawn, tmp_path):
    accuracies = {"arcface": (0.9, 0.902, 0.904), "center": (0.93,), "ring": (0.8, 0.81, 0.82)}
    rows = [make_row(n, s, a) for n, three in accuracies.items() for s, a in enumerate(three)]
    (picture,), _ = figures.draw(rows, tmp_path, baseline="arcface", only=["forest"])
    axes = drawn["forest"].axes[0]
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["baseline: arcface", "worse", "not tested"]
    assert "Holm over 1 test." in picture.caption
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["arcface", "ring", "center"]  # one seed where others have three is last
    verdicts = sweep_plots.VERDICTS
    colours = {name: marker_of(axes, 3 - i).get_color() for i, name in enumerate(names)}
    assert colours["center"] == verdicts["not tested"][0]
    assert colours["ring"] == verdicts["worse"][0]
    assert colours["arcface"] not in {colour for colour, _ in verdicts.values()}
    # Nothing could be tested: nothing is said of tests.
    few = [row for row in rows if row["seed"] == 0]
    (picture,), _ = figures.draw(few, tmp_path, baseline="arcface", only=["forest"])
    labels = drawn["forest"].axes[0].get_legend_handles_labels()[1]
    assert labels == ["baseline: arcface", "not tested"]
    assert "Holm" not in picture.caption


def test_incomplete_settings_are_hollow_and_below(drawn, tmp_path):
    accuracies = {"arcface": (0.9, 0.902, 0.904), "center": (0.93, 0.94, 0.95)}
    rows = [make_row(n, s, a) for n, three in accuracies.items() for s, a in enumerate(three)]
    (picture,), _ = figures.draw(rows, tmp_path, only=["forest"])
    assert "Hollow" not in picture.caption
    rows[-1] = make_row("center", 2, status="diverged: at step 3")
    (picture,), _ = figures.draw(rows, tmp_path, only=["forest"])
    axes = drawn["forest"].axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["arcface", "center"]
    hollow = [marker_of(axes, place).get_markerfacecolor() == "white" for place in (2, 1)]
    assert hollow == [False, True]
    assert "Hollow, below the others: runs are missing" in picture.caption


def test_the_thick_curve_lacks_no_runs(drawn, tmp_path):
    rows = make_grid(seeds=2)
    best = max(range(0, len(rows), 2), key=lambda i: rows[i]["synthetic/accuracy"])
    rows[best + 1]["status"] = "diverged: at step 3"
    figures.draw(rows, tmp_path, only=["parallel"])
    curves = [line for line in drawn["parallel"].axes[0].lines if len(line.get_xdata()) > 2]
    thick = [line.get_linewidth() > 2 for line in curves]
    assert sum(thick) == 1
    assert not thick[-1]  # the curves go from the worst to the best


def test_less_of_an_error_is_better(drawn, tmp_path):
    rows = [make_row(name, 0, a) for name, a in (("arcface", 0.95), ("softmax", 0.9))]
    figures.draw(rows, tmp_path, metric="/eer", only=["forest"])
    names = [text.get_text() for text in drawn["forest"].axes[0].get_yticklabels()]
    assert names == ["arcface", "softmax"]
    assert "less is better" in drawn["forest"].axes[0].get_xlabel()


# Captions, files, errors


def test_captions_name_metric_seeds_device_commit_and_what_is_missing(tmp_path):
    rows = [*make_grid(), make_row("arcface", 9, overrides=words(0.3, 128, 0), status="not run")]
    rows.append(make_row("arcface", 0, 0.9, overrides=words(0.4, 128, 0)))  # seed 0 twice
    pictures, _ = figures.draw(rows, tmp_path)
    for picture in pictures:
        assert "synthetic/accuracy" in picture.caption
        assert "seeds 0 1 2, n = 3 each" in picture.caption
        assert "variant data=small; " in picture.caption
        assert "device 1 x cpu; commit 0123456; " in picture.caption
        assert picture.caption.endswith("1 run not complete; 1 setting not averaged.")
        assert "\n" not in picture.caption


def test_the_command_draws_all_kinds_at_the_page_s_width(tmp_path, capsys):
    table = tmp_path / "runs.csv"
    table.write_text(to_csv(make_grid()))
    out = tmp_path / "pictures"
    figures.run([str(table), "--out", str(out)])
    lines = capsys.readouterr().out.splitlines()
    names = ["forest", "lines_m", "lines_dim", "lines_lambda", "heat_maps", "parallel"]
    names += ["pareto", "speed"]
    assert [line.split(":")[0] for line in lines] == [str(out / f"{name}.png") for name in names]
    assert sorted(path.stem for path in out.iterdir()) == sorted(names)
    for path in out.iterdir():
        with Image.open(path) as image:
            assert image.width == 1200


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"metric": "/no"}, "--metric '/no': no run has such a figure"),
        ({}, {"baseline": "ring"}, "--baseline 'ring' is not among the runs"),
        ({"overrides": ""}, {"only": ["lines"]}, "no override varies within an experiment"),
        ({"overrides": ""}, {"only": ["parallel"]}, "nothing to draw: parallel: no override"),
        ({"status": "not run"}, {}, "none of them done"),
        ({"prototypes/sep_mean": None}, {"only": ["pareto"]}, "no run has prototypes/sep_mean"),
    ],
)
def test_errors_are_one_line(tmp_path, change, options, message):
    rows = [row | change for row in make_grid(ms=(0.3,), dims=(128,), lams=(1,), seeds=1)]
    with pytest.raises(ValueError, match=message) as error:
        figures.draw(rows, tmp_path / "out", **options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_unknown_kind_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="invalid choice: 'pie'"):
        figures.run([str(tmp_path), "--out", str(tmp_path), "--only", "pie"])
