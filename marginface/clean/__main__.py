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
from typing import Any

import numpy as np

from marginface import build, command, runtime
from marginface import config as configs
from marginface.command import Parser
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
    add("--out", type=pathlib.Path, metavar="FILE", help="the list; default: RUN/cleaned.csv")
    options = parser.parse_args(argv)
    out = options.out or options.run / "cleaned.csv"
    if not 0 <= options.max_angle <= 180:
        raise ValueError(f"--max_angle={options.max_angle}: give degrees from 0 to 180")
    config = _config(options.run)
    if out.is_dir() or not out.parent.is_dir():  # now, not when all images are embedded
        raise ValueError(f"--out={out}: give a file in a folder that exists")
    runtime.tune_cpu()
    runtime.tune_gpu()
    runtime.start()
    from marginface.clean import subcenters  # after tune_cpu: JAX reads the flags once
    from marginface.data import cleaned

    faces, embeddings, readable, rows = _embed(options.run, config)
    labels = faces.labels()
    found = subcenters.clean(
        embeddings[readable],
        labels[readable],
        rows,
        num_classes=faces.num_classes,
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


def _config(run: pathlib.Path) -> Any:
    """The config of a complete run with sub-centers."""
    for name in ("config.json", "summary.json"):
        if not (run / name).is_file():
            raise ValueError(f"{run} has no {name}: give the folder of a run that is complete")
    try:
        config = configs.from_json((run / "config.json").read_text(encoding="utf-8"))
        similarity, before = config.loss.similarity, config.data.get("cleaned")
    except (ValueError, TypeError, AttributeError):
        raise ValueError(f"{run}/config.json is no config: give the folder of a run") from None
    if not config.loss.name or similarity != "subcenter_cosine":
        raise ValueError(
            f"{run} has no sub-centers (loss.name={config.loss.name!r}, loss.similarity="
            f"{similarity!r}): train one with experiments/subcenter_arcface.py"
        )
    if before:
        raise ValueError(f"{run} was trained on {before}: give the run which that list was made by")
    return config


def _embed(run: pathlib.Path, config: Any) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray]:
    """The training set, its embeddings [n, d], which images could be read [n]; W [c, k, d]."""
    from absl import logging

    from marginface import sharding
    from marginface.evaluators.common import embed_all
    from marginface.training import objective, step
    from marginface.training.checkpoint import Checkpoints

    logging.use_absl_handler()
    logging.set_verbosity(logging.WARNING)
    faces, _ = build.load_data(config)
    mesh = sharding.make_mesh()
    losses = objective.make(
        config,
        num_classes=faces.num_classes,
        embedding_dim=config.model.embedding_dim,
        mesh=mesh,
        total_steps=1,  # matters in training only
    )
    steps = step.make(
        config,
        model=build.make_model(config),
        objective=losses,
        mesh=mesh,
        image_shape=build.image_shape_of(faces),
        total_steps=1,
    )
    with Checkpoints(run / "checkpoints") as checkpoints:
        restored = checkpoints.restore(steps.like)
    if restored is None:
        raise ValueError(f"{run} has no checkpoint: give the folder of a run that is complete")
    _, state, meta = restored
    if meta["data"] != faces.fingerprint:
        raise ValueError(
            f"{run}: the data set is not the one this run was trained on (fingerprint "
            f"{faces.fingerprint[:12]}, was {meta['data'][:12]}): restore the data"
        )
    prepare, unreadable = build.make_prepare(faces, mesh), []

    def embed(state: step.State, batch: dict[str, np.ndarray]) -> np.ndarray:
        unreadable.append(batch["unreadable"])
        images, _, _ = prepare(sharding.put_global_batch(mesh, batch))
        return np.asarray(steps.embed(state, images))

    batch_size = -(-config.evaluate.batch_size // mesh.size) * mesh.size
    embeddings = embed_all(embed, state, faces.source, faces.decode, batch_size)
    # Where an image could not be read the next one stands in: it says nothing about this label.
    readable = np.concatenate(unreadable)[: len(embeddings)] == 0
    return faces, embeddings, readable, np.asarray(state["params"]["prototypes"])


def main() -> None:
    """The command."""
    command.main(run, "marginface")


if __name__ == "__main__":
    main()
