"""GroupFace's head on any network: one embedding from an instance and from latent groups."""

import importlib
import pkgutil
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from marginface import models
from marginface.models import layers
from marginface.typing import Array, Float

BACKBONES = sorted(
    {module.name for module in pkgutil.iter_modules(models.__path__)} - {"group_head", "layers"}
)
ASSIGNMENTS = ("soft", "hard")


def _dense(features: int, name: str, use_bias: bool = False) -> nn.Dense:
    """Without a bias unless asked: batch normalisation, which follows, takes it away."""
    return nn.Dense(features, use_bias, kernel_init=layers.uniform_fan_in, name=name)


class DecisionNetwork(nn.Module):
    """Which group? Three dense layers, BN and PReLU after two: v_x [b, d] → logits [b, K].

    Returns the last hidden layer [b, hidden[-1]] too. The normalisation is ours; the paper names
    three dense layers and a softmax. With logit_norm the logits are normalised as well, which keeps
    groups alive whatever the labels: a logit that hardly varies from face to face is nobody's
    label, then learns to vary less.
    """

    num_groups: int
    hidden: tuple[int, ...]
    train: bool
    logit_norm: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b d"]) -> tuple[Float[Array, "b k"], Float[Array, "b e"]]:
        def layer(i: int, features: int, x: Array) -> Array:
            return layers.BatchNorm(self.train, name=f"norm{i}")(_dense(features, f"dense{i}")(x))

        for i, features in enumerate(self.hidden, 1):
            x = layers.PReLU(name=f"prelu{i}")(layer(i, features, x))
        last = len(self.hidden) + 1
        if self.logit_norm:
            return layer(last, self.num_groups, x), x
        return _dense(self.num_groups, f"dense{last}", use_bias=True)(x), x


class Model(nn.Module):
    """A backbone and GroupFace's head: [b, h, w, 3] in [-1, 1] → v [b, d], logits, ..., float32.

        v = v_x + v^G,  v^G = Σ_k w_k v^{G_k},  p = softmax(logits),
        w = p ("soft") or 1 at the largest p ("hard")

    The shared feature f is what the backbone returns, without an activation: it makes K + 1 dense
    layers affordable. v_x = BN(dense(f)), scale fixed at 1; v^{G_k} = dense_k(f), small beside v_x
    at the start; logits = DecisionNetwork(v_x).

    Nothing stops a gradient: the loss of the groups trains the decision network and, through v_x,
    the instance layer and the backbone, but no dense_k. The loss of the embedding trains them all;
    with "hard" only the chosen dense_k, and not the decision network, for w is constant.

    Attributes:
        backbone: the module of `marginface.models` whose Model makes the shared feature.
        backbone_kw: its arguments, except embedding_dim.
        embedding_dim: d, length of an embedding.
        feature_dim: length of the shared feature.
        num_groups: K.
        hidden: widths of the decision network's first two layers.
        assignment: "soft" or "hard".
        logit_norm: batch-normalise the decision network's logits; not in the paper.

    Returns:
        "embedding": v [b, d]; "group_logits": [b, K]; "group": v^G [b, d]; "group_feature": the
        last hidden layer of the decision network [b, hidden[-1]], what
        `groups.group_aware_similarity` compares.

    Raises:
        ValueError: unknown backbone or assignment, arguments that the backbone does not take, no
            group; and what the backbone raises.

    References:
        Kim et al., "GroupFace: Learning Latent Groups and Constructing Group-based Representations
        for Face Recognition", 2020, section 3.1 and figure 2.
    """

    backbone: str
    backbone_kw: Any
    embedding_dim: int = 512
    feature_dim: int = 4096
    num_groups: int = 32
    hidden: tuple[int, ...] = (256, 128)
    assignment: str = "soft"
    logit_norm: bool = False

    def __post_init__(self) -> None:
        if self.backbone not in BACKBONES:
            raise ValueError(f"backbone {self.backbone!r}: choose from {', '.join(BACKBONES)}")
        if self.assignment not in ASSIGNMENTS:
            raise ValueError(
                f"assignment {self.assignment!r}: choose from {', '.join(ASSIGNMENTS)}"
            )
        if self.num_groups < 1:
            raise ValueError(f"num_groups is {self.num_groups}; give 1 or more")
        self.backbone_kw = FrozenDict(dict(self.backbone_kw))  # a module must be hashable
        try:
            self._make_backbone(parent=None)  # a wrong argument shows here
        except TypeError as error:
            raise ValueError(f"backbone_kw of {self.backbone}: {error}") from None
        super().__post_init__()

    def _make_backbone(self, **kw: Any) -> nn.Module:
        module = importlib.import_module(f"{models.__name__}.{self.backbone}")
        return module.Model(embedding_dim=self.feature_dim, **self.backbone_kw, **kw)

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w 3"], train: bool = False
    ) -> dict[str, Float[Array, "b _"]]:
        shared = self._make_backbone(name="shared")(images, train=train)
        instance = _dense(self.embedding_dim, "instance")(shared)
        instance = layers.BatchNorm(train, use_scale=False, name="instance_norm")(instance)
        decide = DecisionNetwork(
            self.num_groups, self.hidden, train, self.logit_norm, name="decision"
        )
        logits, group_feature = decide(instance)
        if self.assignment == "soft":
            weights = jax.nn.softmax(logits)
        else:
            weights = jax.nn.one_hot(jnp.argmax(logits, axis=1), self.num_groups)
        # All groups in one matrix product, [b, K·d]; gathering the rows' dense_k would take b·f·d.
        each = _dense(self.num_groups * self.embedding_dim, "groups", use_bias=True)(shared)
        each = each.reshape(-1, self.num_groups, self.embedding_dim)
        group = jnp.einsum("bk,bkd->bd", weights, each)
        return {
            "embedding": instance + group,
            "group_logits": logits,
            "group": group,
            "group_feature": group_feature,
        }
