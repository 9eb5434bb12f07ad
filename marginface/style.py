"""How pictures look: palette, style, width; how they are written."""

import os
import pathlib

import matplotlib
from matplotlib.figure import Figure

# Okabe & Ito's palette: told apart by colour-blind readers and in grey print.
BLUE, VERMILION, GREEN, ORANGE, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7"
GREY = "#666666"

STYLE = matplotlib.rc_context(
    {
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.titleweight": "bold",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#DDDDDD",
        "grid.linewidth": 0.6,
        "legend.framealpha": 0.9,
        "legend.edgecolor": "none",
        "legend.fontsize": 9,
        "figure.facecolor": "white",
        "figure.dpi": 150,
        "savefig.dpi": 150,
    }
)
WIDTH = 8.0  # inches: 1,200 pixels


def cycle(count: int) -> list[str]:
    """So many colours of the palette, over again if need be."""
    palette = (BLUE, VERMILION, GREEN, PURPLE, ORANGE)
    return [palette[i % len(palette)] for i in range(count)]


def save(figure: Figure, path: pathlib.Path) -> None:
    """Writes the whole picture or none."""
    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, format="png")
    os.replace(temporary, path)
