"""What every experiment shares: the data, the network and the schedule that a variant chooses.

A variant stands behind the file name, e.g. experiments/arcface_regular.py:data=lfw,dim=256.

    data=synthetic   the embedded faces, nothing to download (default; under 5 minutes on 2 cores)
    data=small       the same at 32×32 with a smaller network: under a minute
    data=lfw         LFW's development people, root=../shared/data (under 20 minutes on 2 cores)
    data=folder      your own faces, root=<folder or zip of identity/image files>
    data=casia       CASIA-WebFace in the published setting, root=<folder or zip>; one GPU or more
    model=...        sphereface4|10|20|36|64 or ir18|34|50|100
    dim=...          embedding dimension
"""

from typing import Any

from ml_collections import ConfigDict, FieldReference

from marginface.lookup import nearest

MODELS = {
    **{f"sphereface{depth}": ("sphereface", depth) for depth in (4, 10, 20, 36, 64)},
    **{f"ir{depth}": ("iresnet", depth) for depth in (18, 34, 50, 100)},
}


def parse_arg(arg: str | None, **defaults: str | int) -> dict[str, Any]:
    """ "data=lfw,dim=256" → the defaults with these values, each of its default's type.

    Raises:
      ValueError: a key that is not among the defaults, a value of another type, no "=".
    """
    values = dict(defaults)
    for part in filter(None, (arg or "").split(",")):
        key, equals, text = part.partition("=")
        if key not in defaults:
            raise ValueError(f"variant {part!r}: unknown key {key!r}; {nearest(key, defaults)}")
        if not equals:
            raise ValueError(f"variant {part!r}: write {key}=<value>")
        kind = type(defaults[key])
        try:
            values[key] = kind(text)
        except ValueError:
            raise ValueError(f"variant {part!r}: {text!r} is not {kind.__name__}") from None
    return values


def parse_variant(arg: str | None) -> dict[str, Any]:
    """The choices that every experiment offers."""
    return parse_arg(arg, data="synthetic", model="", dim=0, root="")


def base(arg: str | None) -> ConfigDict:
    """The config but for its loss: data, network, optimizer and schedule of the variant `arg`."""
    variant = parse_variant(arg)
    presets = {"synthetic": synthetic, "small": small, "lfw": lfw, "folder": folder, "casia": casia}
    if variant["data"] not in presets:
        hint = nearest(variant["data"], presets)
        raise ValueError(f"variant data={variant['data']!r} is unknown; {hint}")

    config = ConfigDict()
    config.seed = 0
    config.batch_size = 128
    config.epochs = 10.0
    config.steps = 0  # 0: as the epochs say
    config.log_every = 20
    config.checkpoint_every = 200
    config.data = ConfigDict(
        {
            "name": "",
            "workers": 0,
            "images_per_identity": 0,  # K > 0: batches of batch_size / K identities, K images each
            "cleaned": "",  # a list by marginface.clean: its images under its labels only
            "held_out": 0,  # N > 0: validate on N people left out of training, in place of the test
            "kw": {},
        }
    )
    config.model = ConfigDict({"name": "", "embedding_dim": 128, "kw": {}})
    config.loss = ConfigDict(
        {
            "name": "margin_softmax",  # a function of class_losses; "" for none
            "kw": {},
            "margin": "identity",
            "margin_kw": {},
            "detach": False,  # True: the margin without gradient, as arcface_torch has it
            "anneal": {},
            "similarity": "cosine",
            "scale": 32.0,
            "norm_as_scale": False,  # True: the scale is ‖x‖, as SphereFace has it
            "chunk_size": auto(),  # classes at a time, a number; 0: all at once
            "precision": "auto",  # of the other classes' products; highest, tf32 or bfloat16
            "sample_rate": 1.0,  # part of the classes in each step's softmax (Partial FC)
        }
    )
    # Further terms by the names of their functions, each with its weight.
    config.regularizers = ConfigDict()  # of the prototypes
    config.joint = ConfigDict()  # of the embeddings, beside the loss over classes
    config.pairs = ConfigDict()  # of pairs and triplets in the batch
    config.optimizer = ConfigDict(
        {
            "name": "sgd",
            "learning_rate": 0.1,
            "prototypes_factor": 1.0,  # on the rate of prototypes, and of what the terms train
            "weight_decay": 5e-4,
            "momentum": 0.9,
            "b1": 0.9,
            "b2": 0.999,
            "clip_norm": 0.0,
            "accumulate": 1,
        }
    )
    config.schedule = ConfigDict(
        {
            "name": "cosine",
            "warmup": 0.05,  # fractions of the run
            "boundaries": (0.5, 0.75),
            "factor": 0.1,
            "power": 1.0,
        }
    )
    config.evaluate = ConfigDict({"every": 0, "batch_size": 128, "score": "cosine"})
    config.wandb = ConfigDict({"use": False, "project": "marginface", "mode": "offline"})
    config.wandb.update(group="", tags=())  # group: the sweep's folder unless given
    config.tensorboard = False

    presets[variant["data"]](config, variant["root"])
    if variant["model"]:
        if variant["model"] not in MODELS:
            raise ValueError(
                f"variant model={variant['model']!r}; {nearest(variant['model'], MODELS)}"
            )
        config.model.name, config.model.kw.depth = MODELS[variant["model"]]
        if config.model.name == "iresnet" and "norm" in config.model.kw:
            del config.model.kw["norm"]
        elif config.model.name == "sphereface":
            config.model.kw.norm = config.model.kw.get("norm", "none")
    if variant["dim"]:
        config.model.embedding_dim = variant["dim"]
    return config


def synthetic(config: ConfigDict, root: str) -> None:
    """The embedded faces, on a small SphereFace network."""
    if root:
        raise ValueError(f"variant root={root!r}: the embedded faces have no files")
    config.data.name = "synthetic"
    config.data.kw = ConfigDict(
        {
            "identities": 1000,
            "samples": 80,
            "image_size": 48,
            "difficulty": 0.8,
            "seed": 0,
            "long_tail": 0.0,
            "label_noise": 0.0,
            "test_identities": 200,
            "test_samples": 6,
            "pairs": 2000,
            "folds": 10,
        }
    )
    small_network(config)
    config.epochs = 1.0  # an image more costs nothing here: none is seen twice


def small(config: ConfigDict, root: str) -> None:
    """Embedded faces at 32×32 and a quarter of the network's width, to compare many losses."""
    synthetic(config, root)
    config.data.kw.update(identities=400, samples=48, image_size=32)
    config.model.kw.width = 0.25


def lfw(config: ConfigDict, root: str) -> None:
    """LFW View 1: train on peopleDevTrain, threshold from pairsDevTrain, test on pairsDevTest."""
    config.data.name = "lfw"
    config.data.kw = files(root or "../shared/data", image_size=48)
    config.data.kw.crop = 0.95
    # 9,525 images, most people with one only: without strong changes they are learned by heart.
    config.data.kw.augment.update(
        shift=0.06, scale=0.12, rotation=10.0, colour=0.25, grey=0.15, cutout=0.3
    )
    small_network(config)
    config.model.embedding_dim = 256
    config.model.kw.dropout = 0.4
    config.epochs = 14.0
    config.optimizer.weight_decay = 0.3


def folder(config: ConfigDict, root: str) -> None:
    """A folder or zip of identity/image files; a hundred of its people are kept for the test."""
    config.data.name = "folder"
    config.data.kw = files(root, image_size=112)
    config.data.kw.update(test_identities=100, test_pairs=6000, folds=10, seed=0, lfw_root="")
    config.model.name = "iresnet"
    config.model.embedding_dim = 512
    config.model.kw = ConfigDict(
        {"depth": 18, "width": 1.0, "dropout": 0.4, "dtype": "float32", "remat": False}
    )
    config.loss.scale = 64.0


def casia(config: ConfigDict, root: str) -> None:
    """CASIA-WebFace as in ArcFace's table 2: batch 512, 512-d, lr .1 /10 at 20K, 28K, end 32K."""
    folder(config, root)
    config.model.kw.update(depth=50, dtype="bfloat16")
    config.batch_size, config.steps = 512, 32_000
    config.schedule.update(name="step", warmup=0.0, boundaries=(20 / 32, 28 / 32))


def files(root: str, image_size: int) -> ConfigDict:
    """What every reader of image files can be told."""
    augment = {"flip": 0.5, "shift": 0.0, "scale": 0.0, "rotation": 0.0, "colour": 0.0}
    augment |= {"grey": 0.0, "cutout": 0.0, "cutout_size": 0.3}
    return ConfigDict(
        {
            "root": root,
            "image_size": image_size,
            "crop": 1.0,
            "augment": augment,
            "unreadable": "stop",
            "min_images": 1,
        }
    )


def small_network(config: ConfigDict) -> None:
    """A narrow SphereFace-10 with batch normalisation: minutes on two cores."""
    config.model.name = "sphereface"
    config.model.kw = ConfigDict(
        {
            "depth": 10,
            "norm": "batch",
            "width": 0.5,
            "dropout": 0.0,
            "dtype": "float32",
            "remat": False,
        }
    )
    config.loss.scale = 24.0
    config.optimizer.update(name="adamw", learning_rate=2e-3, weight_decay=0.05)
    config.schedule.warmup = 0.07


def class_loss(config: ConfigDict, name: str, *, without: tuple[str, ...] = (), **kw: Any) -> None:
    """Chooses the loss over classes and its arguments; takes out what it has no place for.

    Args:
        config: from base.
        name: a function of class_losses.
        without: "margin" and "scale", where it takes none.
        kw: its own arguments.
    """
    config.loss.name, config.loss.kw = name, ConfigDict(kw)
    for key in without:
        del config.loss[key]


def auto() -> FieldReference:
    """A chunk_size: "auto" until it is given as a number."""
    return FieldReference("auto", field_type=object)


def pairs_only(arg: str | None) -> ConfigDict:
    """The variant's config without a loss over classes, four images of each person in a batch."""
    config = base(arg)
    config.loss = ConfigDict(
        {
            "name": "",
            "kw": {},
            "similarity": "cosine",
            "chunk_size": auto(),
            "precision": "auto",
            "sample_rate": 1.0,
        }
    )
    config.data.images_per_identity = 4
    return config


def search(space: Any, arg: str | None) -> None:
    """The ranges that all losses share: those of the optimizer, SGD's or AdamW's."""
    rate, decay = ((0.01, 0.5), (1e-5, 5e-3)) if full_size(arg) else ((2e-4, 2e-2), (5e-3, 1.0))
    space.log_uniform("optimizer.learning_rate", *rate)
    space.log_uniform("optimizer.weight_decay", *decay)


def anneal(config: ConfigDict, arg: str | None) -> None:
    """λ from 1000 to 5: by SphereFace's 0.12 a step, or within half of a run too short for that."""
    config.loss.anneal = ConfigDict({"start": 1000.0, "least": 5.0, "rate": 0.12, "power": 1.0})
    if not full_size(arg):
        images = {"synthetic": 80_000, "small": 19_200, "lfw": 9_525}[parse_variant(arg)["data"]]
        steps = config.epochs * images / config.batch_size
        config.loss.anneal.rate = round(2 * (1000.0 / 5.0 - 1) / steps, 3)


def full_size(arg: str | None) -> bool:
    """Whether the variant trains at the papers' scale: theirs are the values to take."""
    return parse_variant(arg)["data"] in ("folder", "casia")


def margin(arg: str | None, *, published: float, small: float) -> float:
    """A value for the full-size sets (folder, casia) or for the small ones of the laptop."""
    return published if full_size(arg) else small


def exclusive(
    config: ConfigDict, arg: str | None, *, published: float = 1.0, ramp: str = ""
) -> None:
    """Adds Lr(W): weight 1, or that of RegularFace's code (and its ramp) on the full-size sets."""
    config.regularizers.exclusive = ConfigDict({"weight": 1.0, "chunk_size": auto()})
    if full_size(arg):
        config.regularizers.exclusive.update(weight=published, **({"ramp": ramp} if ramp else {}))
