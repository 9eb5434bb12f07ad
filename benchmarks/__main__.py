"""Runs every benchmark: python -m benchmarks [--quick]."""

from benchmarks import class_softmax, common, exclusive, sweep, train_step

common.main([class_softmax.BENCHMARK, exclusive.BENCHMARK, train_step.BENCHMARK], [sweep.measure])
