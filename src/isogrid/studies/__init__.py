"""Reproducible experiments: each runs, tabulates and draws itself."""

from isogrid.studies.image_compression import run_image_compression
from isogrid.studies.quality_ladder import run_quality_ladder
from isogrid.studies.random_projection import run_random_projection
from isogrid.studies.sentence_encoder import run_sentence_encoder
from isogrid.studies.solver_quality import run_solver_quality

STUDIES = {
    "image_compression": run_image_compression,
    "quality_ladder": run_quality_ladder,
    "random_projection": run_random_projection,
    "sentence_encoder": run_sentence_encoder,
    "solver_quality": run_solver_quality,
}

__all__ = [
    "STUDIES",
    "run_image_compression",
    "run_quality_ladder",
    "run_random_projection",
    "run_sentence_encoder",
    "run_solver_quality",
]
