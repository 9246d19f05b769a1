"""What every test shares: the made-up format stands in the registry, and torch runs on one thread."""

import torch

from tests import toy_format  # noqa: F401 - imported so that it is registered

# The matrices here are tiny: a second thread costs more than it brings, and the sums come out the same everywhere.
torch.set_num_threads(1)
