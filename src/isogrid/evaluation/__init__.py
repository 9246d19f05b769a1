"""Measuring a model: perplexity, sentence similarity, saliency maps, time and memory."""

from isogrid.evaluation.heatmap import heatmap_fidelity, heatmaps
from isogrid.evaluation.latency import (
    Interval,
    Timing,
    forget_peak_memory,
    interleaved_medians,
    interleaved_times,
    median_interval,
    peak_memory_bytes,
    ratio_interval,
    wait_for_gpu,
)
from isogrid.evaluation.mode import evaluating
from isogrid.evaluation.peak import peak_step_bytes, saved_bytes, training_peak_bytes
from isogrid.evaluation.perplexity import Perplexity, is_language_model, perplexity
from isogrid.evaluation.sts import embed_sentences, spearman, sts_spearman
from isogrid.evaluation.tuning import TUNED_ROWS, cold_copies, compare, tune, tune_layers

__all__ = [
    "TUNED_ROWS",
    "Interval",
    "Perplexity",
    "Timing",
    "cold_copies",
    "compare",
    "embed_sentences",
    "evaluating",
    "forget_peak_memory",
    "heatmap_fidelity",
    "heatmaps",
    "interleaved_medians",
    "interleaved_times",
    "is_language_model",
    "median_interval",
    "peak_memory_bytes",
    "peak_step_bytes",
    "perplexity",
    "ratio_interval",
    "saved_bytes",
    "spearman",
    "sts_spearman",
    "training_peak_bytes",
    "tune",
    "tune_layers",
    "wait_for_gpu",
]
