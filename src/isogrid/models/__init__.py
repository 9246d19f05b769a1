"""Small models that studies train."""

from isogrid.models.classifier import SentenceClassifier
from isogrid.models.gpt import GPT, GPTConfig
from isogrid.models.language import characters, random_windows, validation_loss
from isogrid.models.lora import LoRALinear, add_lora

__all__ = [
    "GPT",
    "GPTConfig",
    "LoRALinear",
    "SentenceClassifier",
    "add_lora",
    "characters",
    "random_windows",
    "validation_loss",
]
