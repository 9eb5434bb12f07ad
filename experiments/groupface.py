"""GroupFace: the embedding of a person plus that of the latent group of faces it belongs to.

    v = v_x + Σ_k p_k v^{G_k},   ArcFace(v) + λ CE(group logits, self-distributed label),   λ 0.1
    score: cos(v_i, v_j) − 0.1 ‖g_i − g_j‖^{1/3},   g the decision network's last hidden layer

Kim et al., GroupFace: Learning Latent Groups and Constructing Group-based Representations for Face
Recognition, 2020, sections 3.1 to 3.3. --config.joint.grouping.self_distributed=False takes plain
arg-max labels; --config.model.kw.logit_norm=True keeps groups alive by normalising their logits.
The 450 steps below are --config.epochs=3.

    python -m marginface.main --config experiments/groupface.py:data=small

Time: on two cores, shortest to longest run.
    28 to 48 s (data=small; losses_embedded.csv)
    about 4 minutes (data=synthetic, not timed)
Expect: verification accuracy, mean ± 95 % interval over seeds; tables in results/.
    92.31 ± 0.15 % (data=small, 5 seeds; study_embedded.csv)
    92.48 ± 0.50 % (data=small, 3 seeds; losses_embedded.csv)
    95.37 ± 0.19 % (data=small, steps=450, labels=self-distributed, 3 seeds; groupface_usage.csv)
    92.03 ± 1.72 % (data=small, steps=150, labels=arg-max, 3 seeds; groupface_usage.csv)
    94.75 ± 0.12 % (data=small, steps=450, labels=arg-max, 3 seeds; groupface_usage.csv)
    not run (data=synthetic, lfw, folder, casia)
"""

from ml_collections import ConfigDict

from experiments import arcface, common


def get_config(arg=None):
    """The config of the variant `arg`, see common."""
    config = arcface.get_config(arg)
    full = common.full_size(arg)
    backbone = config.model.name, config.model.kw
    config.model.name = "group_head"
    config.model.kw = ConfigDict(
        {
            "backbone": backbone[0],
            "backbone_kw": backbone[1],
            "feature_dim": 4096 if full else 512,
            "num_groups": 32 if full else 8,
            "assignment": "soft",
            "logit_norm": False,
        }
    )
    config.joint.grouping = ConfigDict(
        {"weight": 0.1, "momentum": 0.9 if full else 0.5, "self_distributed": True}
    )
    config.evaluate.score = "group_aware"
    return config


def sweep(add, arg=None):
    """The baseline first, then every point of the grid."""
    for dim in (128, 256, 512):
        for groups in (1, 8, 32):
            add({"model.embedding_dim": dim, "model.kw.num_groups": groups})


def search(space, arg=None):
    """The ranges in which it is tuned, with what all losses share."""
    arcface.search(space, arg)
    space.log_uniform("joint.grouping.weight", 0.01, 1.0)
