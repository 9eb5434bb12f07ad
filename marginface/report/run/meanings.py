"""What each figure means: whoever prints or draws one asks here."""

from typing import NamedTuple


class Meaning(NamedTuple):
    """How a figure is read.

    line: what it means, in one line; "" where that is not known.
    heading: what tables and plots call it.
    format: of the number with its unit, on a run's page.
    digits: behind the point, in a table of runs.
    unit: of a plot's axis; where it is "%", tables and plots show a hundred times the number.
    less: whether less is better.
    curve: whether a run's page draws it over the steps.
    """

    line: str = ""
    heading: str = ""
    format: str = "{:.4g}"
    digits: int = 4
    unit: str = ""
    less: bool = False
    curve: bool = False

    @property
    def factor(self) -> float:
        """What tables and plots multiply the number with."""
        return 100.0 if self.unit == "%" else 1.0

    @property
    def title(self) -> str:
        """The heading of a column or an axis."""
        return f"{self.heading} (%)" if self.unit == "%" else self.heading

    @property
    def form(self) -> str:
        """The format of a number in a table, such as ".2f"."""
        return f".{self.digits}f"


def _part(line: str, heading: str = "", **kw: bool) -> Meaning:
    """The meaning of a part of something, from 0 to 1."""
    return Meaning(line, heading, "{:.2%}", digits=2, unit="%", **kw)


# By the last part of a figure's name; curves are drawn in this order.
TABLE = {
    "accuracy": _part("pairs decided rightly, threshold of other pairs", curve=True),
    "auc": Meaning("chance that genuine outscores impostor pair", "AUC", "{:.4f}"),
    "eer": _part("error rate where both errors are equal", less=True),
    "tar@far=1e-1": _part("genuine accepted if 1 impostor in 10 may be"),
    "tar@far=1e-2": _part("genuine accepted if 1 impostor in 100 may be"),
    "tar@far=1e-3": _part("genuine accepted if 1 impostor in 1,000 may"),
    "threshold": Meaning("cosine from which a pair is accepted", format="{:.4f}"),
    "top1": _part("training images nearest to their own class", "training top-1", curve=True),
    "target_angle": Meaning(
        "mean angle of images to their own class",
        "mean angle to the own class",
        "{:.1f}°",
        unit="degrees",
        curve=True,
    ),
    "learning_rate": Meaning("step size at the end", "learning rate", unit="step size", curve=True),
    "sep_mean": Meaning(
        "mean cosine to the nearest other class",
        "mean Sep",
        "{:.4f}",
        unit="cosine",
        less=True,
        curve=True,
    ),
    "sep_var": Meaning("variance of that cosine over the classes", "var Sep", less=True),
    "gradient_norm": Meaning("length of the last gradient", "gradient norm"),
    "total": Meaning("the sum that is minimised"),
    "grouping": Meaning("cross-entropy of the latent groups with their own labels"),
    "margin_softmax": Meaning("mean cross-entropy with the margin"),
    "group_entropy": Meaning("evenness of group usage: 1 even, 0 all in one", format="{:.3f}"),
    "group_largest": Meaning("largest group's share × number of groups", format="{:.2f}"),
    "collapsed": Meaning("1 if the triplet loss has collapsed to one point", format="{:.0f}"),
    "spread": Meaning("variance of unit embeddings: 0 one point, 1 everywhere"),
    "exclusive": Meaning("Lr(W), mean cosine to nearest other class"),
    "unreadable": Meaning(
        "training images skipped: they could not be read", format="{:,.0f}", less=True
    ),
    "examples_per_s": Meaning(
        "training images per second",
        "training images per second",
        "{:,.0f}",
        unit="images / s",
        curve=True,
    ),
    "together": Meaning("runs that trained in one program and shared its time", format="{:.0f}"),
    "wall_s": Meaning("from start to end", "wall time, s", "{:,.0f} s", digits=0, less=True),
}


def of(name: str) -> Meaning:
    """How the figure of this name is read, by its last part; one that nobody knows has defaults.

    Of a loss less is better, and of a standard error ("accuracy_stderr"), which is read as what it
    is the error of.
    """
    last = name.rpartition("/")[2]
    found = TABLE.get(last.removesuffix("_stderr"), Meaning())
    if last.endswith("_stderr"):
        found = found._replace(line="", heading=last, less=True, curve=False)
    less = found.less or name.startswith("loss/")
    return found._replace(heading=found.heading or last, less=less)
