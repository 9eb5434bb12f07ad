"""ArcFace over a tenth of the classes in each step (Partial FC).

    the classes of the batch and others at random, anew in each step

An et al., Killing Two Birds with One Stone: Efficient and Robust Training of Face Recognition CNNs
by Partial FC, 2022, section 3.2. Classes left out of a step take no gradient from it, but momentum
and weight decay go on for them (arcface_torch halts those too). Each device keeps the classes of
its whole batch even where those are more than a tenth of its part: few classes, many devices.

    python -m marginface.main --config experiments/arcface_partial_fc.py:data=small

Time: on two cores, shortest to longest run.
    19 to 50 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    91.37 ± 0.81 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
"""

from experiments import arcface


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = arcface.get_config(arg)
    config.loss.sample_rate = 0.1
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for rate in (1.0, 0.5, 0.2, 0.1):
            add({"model.embedding_dim": dim, "loss.sample_rate": rate})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    arcface.search(space, arg)
