"""Softmax with center loss: embeddings are drawn to the moving mean of their class.

    softmax + (λ/2) ‖x − c_y‖²,   c_j moved by the rate α

Wen et al., A Discriminative Feature Learning Approach for Deep Face Recognition, 2016, equations 2
to 5; λ 0.003, α 0.5.

    python -m marginface.main --config experiments/center.py:data=small

Time: on two cores, shortest to longest run.
    19 to 35 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    92.37 ± 0.67 % (data=small, 5 seeds; study_embedded.csv)
    92.75 ± 0.22 % (data=small, 3 seeds; losses_embedded.csv)
    not run (data=synthetic, lfw, folder, casia)
"""

from ml_collections import ConfigDict

from experiments import softmax


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = softmax.get_config(arg)
    config.joint.center = ConfigDict({"weight": 0.003, "rate": 0.5})
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for weight in (0.0, 0.001, 0.003, 0.01):
            add({"model.embedding_dim": dim, "joint.center.weight": weight})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    softmax.search(space, arg)
    space.log_uniform("joint.center.weight", 0.0001, 0.1)
    space.uniform("joint.center.rate", 0.1, 1.0)
