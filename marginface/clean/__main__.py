"""marginface clean RUN [--max_angle 75] [--no_relabel] [--out RUN/cleaned.csv]

Finds wrong labels with the network of a run of sub-center ArcFace that is complete. Then train with
one prototype for each class on what it keeps:

    marginface train --config experiments/arcface.py --config.data.cleaned=RUN/cleaned.csv

Also `python -m marginface.clean`. Exit codes: 0 done; 2 a mistake in the options or the run folder.

Deng et al., Sub-center ArcFace: Boosting Face Recognition by Large-scale Noisy Web Faces, 2020,
section 3.3. The paper leaves images out; --no_relabel does that and no more.
"""

import pathlib
from collections.abc import Sequence

import numpy as np
from absl import logging

from marginface import command, runtime
from marginface.command import Parser
from marginface.config import Config
from marginface.runs import folder as run_folder
from marginface.runs.files import write_atomically


def run(argv: Sequence[str]) -> None:
    """Writes the list that `argv` (without the program's name) asks for.

    Raises:
        ValueError: an option or a run folder that does not fit; one line that says which.
    """
    parser = Parser("marginface clean", __doc__)
    add = parser.add_argument
    add("run", type=pathlib.Path, metavar="RUN", help="the run's folder")
    add("--max_angle", type=float, default=75.0, help="degrees to the dominant sub-center")
    add("--no_relabel", action="store_true", help="leave images out, give none to another class")
    add(
        "--out",
        type=pathlib.Path,
        metavar="FILE",
        help=f"the list; default: RUN/{run_folder.CLEANED}",
    )
    options = parser.parse_args(argv)
    out = options.out or options.run / run_folder.CLEANED
    if not 0 <= options.max_angle <= 180:
        raise ValueError(f"--max_angle={options.max_angle}: give degrees from 0 to 180")
    _check(options.run, run_folder.config_of(options.run))
    if out.is_dir() or not out.parent.is_dir():  # now, not when all images are embedded
        raise ValueError(f"--out={out}: give a file in a folder that exists")
    runtime.tune_cpu()
    runtime.tune_gpu()
    runtime.start()
    from marginface.clean import subcenters  # after tune_cpu: JAX reads the flags once
    from marginface.data import cleaned
    from marginface.runs import trained

    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    opened = trained.load(options.run)
    labels = opened.faces.labels()
    embeddings, readable = opened.embed(opened.faces)  # of what is not readable: of the next image
    found = subcenters.clean(
        embeddings[readable],
        labels[readable],
        np.asarray(opened.state["params"]["prototypes"]),
        num_classes=opened.faces.num_classes,
        max_angle=options.max_angle,
        relabel=not options.no_relabel,
    )
    new_labels, angles = np.full(len(labels), subcenters.DROPPED), np.full(len(labels), np.nan)
    new_labels[readable], angles[readable] = found.label, found.angle
    lines = (
        f"{index},{label},{new},{angle:.3f}\n"
        for index, (label, new, angle) in enumerate(zip(labels, new_labels, angles, strict=True))
    )
    write_atomically(out, f"{cleaned.COLUMNS}\n{''.join(lines)}")
    kept, dropped = int(found.keep.sum()), int((new_labels == subcenters.DROPPED).sum())
    print(
        f"kept {kept}, relabelled {len(labels) - kept - dropped}, dropped {dropped} of "
        f"{len(labels)} images: {out}",
        flush=True,
    )


def _check(run: pathlib.Path, config: Config) -> None:
    """Sees that a run has sub-centers, and was trained on what is to be cleaned."""
    if not config.loss.name or config.loss.similarity != "subcenter_cosine":
        raise ValueError(
            f"{run} has no sub-centers (loss.name={config.loss.name!r}, loss.similarity="
            f"{config.loss.similarity!r}): train one with experiments/subcenter_arcface.py"
        )
    if before := config.data.get("cleaned"):  # which a config of an earlier version may lack
        raise ValueError(f"{run} was trained on {before}: give the run which that list was made by")


def main() -> None:
    """The command."""
    command.main(run, "marginface")


if __name__ == "__main__":
    main()
