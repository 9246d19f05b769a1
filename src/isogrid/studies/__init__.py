"""Reproducible experiments: each runs, tabulates and draws itself."""

from isogrid.studies.advice import run_advice
from isogrid.studies.compressed_finetuning import run_compressed_finetuning
from isogrid.studies.image_compression import run_image_compression
from isogrid.studies.low_rank_emergence import run_low_rank_emergence
from isogrid.studies.optimizer_memory import run_optimizer_memory
from isogrid.studies.optimizer_quality import run_optimizer_quality
from isogrid.studies.quality_ladder import run_quality_ladder
from isogrid.studies.random_projection import run_random_projection
from isogrid.studies.sentence_encoder import run_sentence_encoder
from isogrid.studies.solver_quality import run_solver_quality
from isogrid.studies.sparsity import run_sparsity
from isogrid.studies.sst2_finetuning import run_sst2_finetuning
from isogrid.studies.structured_pruning import run_structured_pruning
from isogrid.studies.time_budget import run_time_budget
from isogrid.studies.trit_quality import run_trit_quality

STUDIES = {
    "advice": run_advice,
    "compressed_finetuning": run_compressed_finetuning,
    "image_compression": run_image_compression,
    "low_rank_emergence": run_low_rank_emergence,
    "optimizer_memory": run_optimizer_memory,
    "optimizer_quality": run_optimizer_quality,
    "quality_ladder": run_quality_ladder,
    "random_projection": run_random_projection,
    "sentence_encoder": run_sentence_encoder,
    "solver_quality": run_solver_quality,
    "sparsity": run_sparsity,
    "sst2_finetuning": run_sst2_finetuning,
    "structured_pruning": run_structured_pruning,
    "time_budget": run_time_budget,
    "trit_quality": run_trit_quality,
}

__all__ = [
    "STUDIES",
    "run_advice",
    "run_compressed_finetuning",
    "run_image_compression",
    "run_low_rank_emergence",
    "run_optimizer_memory",
    "run_optimizer_quality",
    "run_quality_ladder",
    "run_random_projection",
    "run_sentence_encoder",
    "run_solver_quality",
    "run_sparsity",
    "run_sst2_finetuning",
    "run_structured_pruning",
    "run_time_budget",
    "run_trit_quality",
]
