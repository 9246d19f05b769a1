"""What every test shares: the made-up format stands in the registry, torch runs on one thread, no layer is tuned."""

import atexit
import os
import shutil
import tempfile

import torch

from tests import toy_format  # noqa: F401 - imported so that it is registered

# The matrices here are tiny: a second thread costs more than it brings, and the sums come out the same everywhere.
torch.set_num_threads(1)

# Which product a layer takes must not depend on what was measured on this machine; set for child processes, too.
os.environ["ISOGRID_SPEED"] = tempfile.mkdtemp(prefix="isogrid-speed-")
atexit.register(shutil.rmtree, os.environ["ISOGRID_SPEED"], ignore_errors=True)
