"""The queue, the most valuable question first."""

from benchmarks.gpu.ceilings import CEILINGS, CONVOLUTIONS
from benchmarks.gpu.classes import EXCLUSIVE, SOFTMAX_1M, SOFTMAX_100K, TEN_MILLION
from benchmarks.gpu.faces import FACES
from benchmarks.gpu.losses import LOSSES
from benchmarks.gpu.networks import TRAIN_IR50, TRAIN_OTHERS
from benchmarks.gpu.sweep import SWEEP

QUESTIONS = (
    CEILINGS,
    SOFTMAX_1M,
    TRAIN_IR50,
    TEN_MILLION,
    EXCLUSIVE,
    LOSSES,
    FACES,
    SWEEP,
    CONVOLUTIONS,
    SOFTMAX_100K,
    TRAIN_OTHERS,
)
