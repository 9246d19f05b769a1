"""Real data and pretrained models by name: texts, sentence pairs, photographs, and models that packages carry."""

from isogrid.data.cifar import load_cifar10
from isogrid.data.images import load_photographs, open_photographs, prepare_image
from isogrid.data.lookup import DATASETS, DatasetNotFoundError, data_folders, find_dataset
from isogrid.data.pairs import SentencePairs, load_sts
from isogrid.data.pretrained import PRETRAINED, Pretrained, load_pretrained, pretrained_folder
from isogrid.data.sentiment import LabelledTexts, load_imdb, load_sst2
from isogrid.data.stories260k import StoriesTokenizer, load_stories260k
from isogrid.data.text import TEXTS, load_text, token_windows

__all__ = [
    "DATASETS",
    "PRETRAINED",
    "TEXTS",
    "DatasetNotFoundError",
    "LabelledTexts",
    "Pretrained",
    "SentencePairs",
    "StoriesTokenizer",
    "data_folders",
    "find_dataset",
    "load_cifar10",
    "load_imdb",
    "load_photographs",
    "load_pretrained",
    "load_sst2",
    "load_stories260k",
    "load_sts",
    "load_text",
    "open_photographs",
    "prepare_image",
    "pretrained_folder",
    "token_windows",
]
