"""Reproducible experiments: each runs, tabulates and draws itself."""

from isogrid.studies.image_compression import run_image_compression
from isogrid.studies.random_projection import run_random_projection
from isogrid.studies.sentence_encoder import run_sentence_encoder

STUDIES = {
    "image_compression": run_image_compression,
    "random_projection": run_random_projection,
    "sentence_encoder": run_sentence_encoder,
}

__all__ = ["STUDIES", "run_image_compression", "run_random_projection", "run_sentence_encoder"]
