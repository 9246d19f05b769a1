"""Reproducible experiments: each runs, tabulates and draws itself."""

from isogrid.studies.sentence_encoder import run_sentence_encoder

STUDIES = {"sentence_encoder": run_sentence_encoder}

__all__ = ["STUDIES", "run_sentence_encoder"]
