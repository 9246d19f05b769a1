"""Measuring a model: perplexity, sentence similarity, saliency maps, time and memory."""

from isogrid.evaluation.heatmap import heatmap_fidelity, heatmaps
from isogrid.evaluation.latency import Timing, forget_peak_memory, interleaved_medians, peak_memory_bytes
from isogrid.evaluation.mode import evaluating
from isogrid.evaluation.peak import peak_step_bytes, saved_bytes, training_peak_bytes
from isogrid.evaluation.perplexity import Perplexity, perplexity
from isogrid.evaluation.sts import embed_sentences, spearman, sts_spearman
from isogrid.evaluation.tuning import compare, tune

__all__ = [
    "Perplexity",
    "Timing",
    "compare",
    "embed_sentences",
    "evaluating",
    "forget_peak_memory",
    "heatmap_fidelity",
    "heatmaps",
    "interleaved_medians",
    "peak_memory_bytes",
    "peak_step_bytes",
    "perplexity",
    "saved_bytes",
    "spearman",
    "sts_spearman",
    "training_peak_bytes",
    "tune",
]
