"""What every experiment shares: the data, the network and the schedule that a variant chooses.

A variant stands behind the file name, e.g. experiments/arcface_regular.py:data=lfw,dim=256.

    data=synthetic   the embedded faces, nothing to download (default; about 4 minutes on 2 cores)
    data=small       the same at 32×32 with a smaller network: half a minute
    data=lfw         LFW's development people, root=../shared/data (about 8 minutes on 2 cores)
    data=folder      your own faces, root=<folder or zip of identity/image files>
    data=casia       CASIA-WebFace in the published setting, root=<folder or zip>; one GPU or more
    model=...        sphereface4|10|20|36|64 or ir18|34|50|100
    dim=...          embedding dimension

Every experiment's docstring ends with what its command takes and gives, each line with the data
and the table in results/ that holds the runs.

    Time        the shortest and the longest run; some ran beside other work
    Expect      the mean over seeds ± half the width of its 95 % interval (Student's t), or the
                lowest and the highest where all runs have one seed; tables of the same data
                are of different versions of the code
    Published   what a paper prints, and the setting there
"""

from collections.abc import Callable
from typing import Any, NamedTuple

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
    chosen = preset(arg)

    config = ConfigDict()
    config.seed = 0  # of the first weights, the order of the images and all other chance
    config.batch_size = 128  # images in an update, over all devices
    config.epochs = 10.0  # passes over the training images
    config.steps = 0  # updates of the run; 0: as the epochs say
    config.log_every = 20  # updates from one line of metrics.jsonl to the next
    config.checkpoint_every = 200  # updates
    config.data = ConfigDict(
        {
            "name": "",  # a module of data.readers: synthetic, lfw or folder; or "file.py:load"
            "workers": 0,  # processes that read images; 0: threads of the run's own
            "images_per_identity": 0,  # K > 0: batches of batch_size / K identities, K images each
            "cleaned": "",  # a list by marginface.clean: its images under its labels only
            "held_out": 0,  # N > 0: validate on N people left out of training, in place of the test
            "kw": {},  # arguments of the reader
        }
    )
    config.model = ConfigDict(
        {
            "name": "",  # a module of models: sphereface, iresnet or group_head; or "file.py:Model"
            "embedding_dim": 128,  # length of an embedding
            "kw": {},  # arguments of the network
        }
    )
    config.loss = ConfigDict(
        {
            "name": "margin_softmax",  # a function of class_losses; "" for none
            "kw": {},  # its own arguments
            "margin": "identity",  # a function of margins, of the true class's cosine
            "margin_kw": {},  # its arguments
            "detach": False,  # True: the margin without gradient, as arcface_torch has it
            "anneal": {},  # start, least, rate, power: the margin sets in slowly, see anneal
            "similarity": "cosine",  # of embedding and prototype; or linear, subcenter_cosine
            "scale": 32.0,  # s, the factor on every similarity
            "norm_as_scale": False,  # True: the factor is scale · ‖x‖, as SphereFace has it
            "chunk_size": auto(),  # classes at a time; 0: all at once; auto: as memory suggests
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
            "name": "sgd",  # or adamw, lamb
            "learning_rate": 0.1,  # the highest, after the warm-up
            "prototypes_factor": 1.0,  # on the rate of prototypes, and of what the terms train
            "weight_decay": 5e-4,  # of matrices and kernels; vectors are spared
            "momentum": 0.9,  # of sgd
            "b1": 0.9,  # of adamw and lamb: decay of the gradient's moving mean
            "b2": 0.999,  # of adamw and lamb: decay of the moving mean of its square
            "clip_norm": 0.0,  # the largest norm of the gradient; 0: no limit
            "accumulate": 1,  # parts that a batch is cut into, one after the other
        }
    )
    config.schedule = ConfigDict(
        {
            "name": "cosine",  # or constant, step, polynomial
            "warmup": 0.05,  # fraction of the run over which the rate rises from 0
            "boundaries": (0.5, 0.75),  # of step: fractions of the run
            "factor": 0.1,  # of step: on the rate at each boundary
            "power": 1.0,  # of polynomial: its exponent
        }
    )
    config.evaluate = ConfigDict(
        {
            "every": 0,  # updates from one evaluation to the next; 0: only before and after all
            "batch_size": 128,  # images embedded at a time
            "score": "cosine",  # of two images; or group_aware, siamese
        }
    )
    # What is measured, in the order of the names. Its type is a module of evaluators or
    # "path/to/file.py:Evaluator"; its data "tests", for each test set of the training reader, the
    # name of one, or another reader's {"name": ..., "kw": {...}}. It may have every, batch_size
    # and score of its own, and what else its evaluator takes.
    config.evals = ConfigDict(
        {
            "pairs": {"type": "verification", "data": "tests"},
            "prototypes": {"type": "geometry"},  # nothing where classes have none, or several
            "usage": {"type": "grouping", "data": "tests"},  # of latent groups, where there are
        }
    )
    config.wandb = ConfigDict(
        {
            "use": False,  # True: log to Weights & Biases, too
            "project": "marginface",  # its name there
            "mode": "offline",  # or online
            "group": "",  # "": the sweep's folder
            "tags": (),  # words to find the run by
        }
    )
    config.tensorboard = False  # True: write event files, too

    chosen.fill(config, variant["root"])
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
            "identities": 1000,  # people to train on
            "samples": 80,  # images of each of them
            "image_size": 48,  # side in pixels, a multiple of 8
            "difficulty": 0.8,  # 0: nearly passport photographs, 2: hard
            "seed": 0,  # of the population, not of the run
            "long_tail": 0.0,  # exponent of images over people; 0: the same number of each
            "label_noise": 0.0,  # fraction of training labels that are wrong
            "test_identities": 200,  # people of the test, never trained on
            "test_samples": 6,  # images of each of them
            "pairs": 2000,  # of the test, half of them the same person
            "folds": 10,  # of the test; nobody is in two
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
    config.data.kw.update(
        test_identities=100,  # people of the test, never trained on
        test_pairs=6000,  # half of them the same person
        folds=10,  # of the test; nobody is in two
        seed=0,  # of the choice of people and pairs
        lfw_root="",  # a folder with LFW: test on its ten folds, too
    )
    config.model.name = "iresnet"
    config.model.embedding_dim = 512
    config.model.kw = ConfigDict(
        {
            "depth": 18,  # layers: 18, 34, 50 or 100
            "width": 1.0,  # factor on the number of channels
            "dropout": 0.4,  # rate before the dense layer
            "dtype": "float32",  # of the convolutions; or bfloat16
            "remat": False,  # True: compute blocks again in the backward pass, to save memory
        }
    )
    config.loss.scale = 64.0


def casia(config: ConfigDict, root: str) -> None:
    """CASIA-WebFace as in ArcFace's table 2: batch 512, 512-d, lr .1 /10 at 20K, 28K, end 32K."""
    folder(config, root)
    config.model.kw.update(depth=50, dtype="bfloat16")
    config.batch_size, config.steps = 512, 32_000
    config.schedule.update(name="step", warmup=0.0, boundaries=(20 / 32, 28 / 32))


class Preset(NamedTuple):
    """A choice of data=...; a new one is a row of PRESETS and the function that it names.

    fill: (config, root) → None; sets data, network and schedule.
    full_size: trains at the papers' scale: theirs are the values to take.
    images: config → number of training images, to which `anneal` fits its rate; None: it takes
        SphereFace's own.
    """

    fill: Callable[[ConfigDict, str], None]
    full_size: bool = False
    images: Callable[[ConfigDict], int] | None = None


def rendered(config: ConfigDict) -> int:
    """How many embedded faces there are to train on."""
    return config.data.kw.identities * config.data.kw.samples


PRESETS = {
    "synthetic": Preset(synthetic, images=rendered),
    "small": Preset(small, images=rendered),
    "lfw": Preset(lfw, images=lambda config: 9_525),
    "folder": Preset(folder, full_size=True),
    "casia": Preset(casia, full_size=True),
}


def preset(arg: str | None) -> Preset:
    """The preset of the variant's data.

    Raises:
      ValueError: no such data; names the nearest.
    """
    data = parse_variant(arg)["data"]
    if data not in PRESETS:
        raise ValueError(f"variant data={data!r} is unknown; {nearest(data, PRESETS)}")
    return PRESETS[data]


def full_size(arg: str | None) -> bool:
    """Whether the variant trains at the papers' scale."""
    return preset(arg).full_size


def by_size(arg: str | None, *, published: float, small: float) -> float:
    """The published value for data at the papers' scale, the other one for small data."""
    return published if full_size(arg) else small


def files(root: str, image_size: int) -> ConfigDict:
    """What every reader of image files can be told."""
    return ConfigDict(
        {
            "root": root,  # where the files lie: a folder, or a zip file where the reader takes it
            "image_size": image_size,  # side in pixels that the network sees
            "crop": 1.0,  # middle fraction of an image that is kept
            "augment": {  # random changes in training
                "flip": 0.5,  # probability of a mirror image
                "shift": 0.0,  # the largest, as a fraction of the side
                "scale": 0.0,  # the largest |log| of the factor on the size
                "rotation": 0.0,  # the largest angle, degrees
                "colour": 0.0,  # brightness, contrast, saturation: factors in 1 ± colour
                "grey": 0.0,  # probability of an image without colour
                "cutout": 0.0,  # probability of a grey rectangle
                "cutout_size": 0.3,  # side of the rectangle, as a fraction of the image's
            },
            "unreadable": "stop",  # or skip: train on the next image instead, and count
            "min_images": 1,  # people with fewer are left out of training
        }
    )


def small_network(config: ConfigDict) -> None:
    """A narrow SphereFace-10 with batch normalisation: minutes on two cores."""
    config.model.name = "sphereface"
    config.model.kw = ConfigDict(
        {
            "depth": 10,  # layers: 4, 10, 20, 36 or 64
            "norm": "batch",  # normalisation after each layer; none: as the paper
            "width": 0.5,  # factor on the number of channels
            "dropout": 0.0,  # rate before the dense layer
            "dtype": "float32",  # of the convolutions; or bfloat16
            "remat": False,  # True: compute pairs of layers again in the backward pass
        }
    )
    config.loss.scale = 24.0
    config.optimizer.update(name="adamw", learning_rate=2e-3, weight_decay=0.05)
    config.schedule.warmup = 0.07


def class_loss(config: ConfigDict, name: str, *, without: tuple[str, ...] = (), **kw: Any) -> None:
    """Chooses the loss over classes and its arguments; takes out what it has no place for.

    Args:
        config: from base.
        name: a function of class_losses; "" for none.
        without: keys of config.loss to take out, such as "margin" where it takes none.
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
    of_classes = ("margin", "margin_kw", "detach", "anneal", "scale", "norm_as_scale")
    class_loss(config, "", without=of_classes)
    config.data.images_per_identity = 4
    return config


def search(space: Any, arg: str | None) -> None:
    """The ranges that all losses share: those of the optimizer, SGD's or AdamW's."""
    rate, decay = ((0.01, 0.5), (1e-5, 5e-3)) if full_size(arg) else ((2e-4, 2e-2), (5e-3, 1.0))
    space.log_uniform("optimizer.learning_rate", *rate)
    space.log_uniform("optimizer.weight_decay", *decay)


def anneal(config: ConfigDict, arg: str | None) -> None:
    """λ from 1000 to 5: by SphereFace's 0.12 a step, or within half of a run too short for that."""
    config.loss.anneal = ConfigDict(
        {
            "start": 1000.0,  # λ of the first step, the weight of the plain cosine
            "least": 5.0,  # λ never falls below
            "rate": 0.12,  # a step
            "power": 1.0,  # λ = start · (1 + rate · step)^−power
        }
    )
    count = preset(arg).images
    if count is not None:
        steps = config.epochs * count(config) / config.batch_size
        config.loss.anneal.rate = round(2 * (1000.0 / 5.0 - 1) / steps, 3)


def exclusive(
    config: ConfigDict, arg: str | None, *, published: float = 1.0, ramp: str = ""
) -> None:
    """Adds Lr(W): weight 1, or that of RegularFace's code (and its ramp) on the full-size sets."""
    config.regularizers.exclusive = ConfigDict(
        {
            "weight": 1.0,  # λ, the factor on Lr(W)
            "chunk_size": auto(),  # classes at a time; 0 and auto: as loss.chunk_size says
        }
    )
    if full_size(arg):
        config.regularizers.exclusive.update(weight=published, **({"ramp": ramp} if ramp else {}))
