"""Building the native products: once a machine, by its own compiler, kept in a folder of the user's cache.

PyTorch's block products are no stable interface: what is built belongs to one version of torch, of the compiler and of
this source, which make its name.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import filelock
import torch

SOURCES = ("blocked.cpp", "backward.cpp", "columns.cpp", "gradients.cpp", "sparse.cpp", "subspaces.cpp", "trits.cpp")
HEADERS = ("coupling.h", "few.h", "panels.h", "registers.h", "stages.h", "tiles.h")
# Every processor that has the first has the others but the oldest ones; all are asked for at run time.
NEEDED = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "fma3")
FLAGS = (
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-shared",
    "-fopenmp",
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512dq",
    "-mfma",
    "-mpopcnt",
)


def flags() -> tuple[str, ...]:
    """Of the compiler, for this processor; they are part of what names a library, so machines can share a cache."""
    return (*FLAGS, "-mavx512bf16") if torch.cpu.get_capabilities().get("avx512_bf16") else FLAGS


def cache_folder() -> Path:
    """``$ISOGRID_CACHE``, or ``isogrid`` in the user's cache."""
    named = os.environ.get("ISOGRID_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isogrid"


def unsuitable() -> str | None:
    """Why this machine has no native products; None where it may."""
    if os.environ.get("ISOGRID_NATIVE", "1") == "0":
        return "ISOGRID_NATIVE is 0"
    if sys.platform != "linux":
        return f"they are built on Linux, this is {sys.platform}"
    if torch.backends.cpu.get_cpu_capability() not in ("AVX512", "AVX512_VNNI", "AVX512_BF16"):
        return f"torch runs on this processor as {torch.backends.cpu.get_cpu_capability()}, they need AVX512"
    known = torch.cpu.get_capabilities()
    missing = [name for name in NEEDED if not known.get(name)]
    return f"the processor has no {missing[0]}" if missing else None


def compiler() -> str | None:
    """The C++ compiler: ``$CXX``, g++ or clang++; None without one."""
    for name in (os.environ.get("CXX"), "g++", "clang++"):
        if name and shutil.which(name):
            return shutil.which(name)
    return None


def shared_object(say: bool = True) -> Path:
    """The shared library for this torch, compiler and source; built when it isn't there yet.

    Raises:
        OSError: no compiler, or it failed; the message has its last words.
    """
    tool = compiler()
    if tool is None:
        raise OSError("no C++ compiler (g++ or clang++, or name one in CXX)")
    folder = Path(__file__).parent
    version = subprocess.run([tool, "--version"], capture_output=True, text=True, check=False).stdout
    digest = hashlib.sha256("\n".join([torch.__version__, torch.version.git_version, version, *flags()]).encode())
    for name in (*SOURCES, *HEADERS):
        digest.update((folder / name).read_bytes())
    place = cache_folder() / "native" / f"isogrid-{digest.hexdigest()[:16]}.so"
    if place.is_file():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{place}.lock"):
        if not place.is_file():  # another process may have built it meanwhile
            if say:
                print("isogrid: building its native products, once (about 30 s)", file=sys.stderr, flush=True)
            _build(tool, folder, place)
    return place


def _build(tool: str, folder: Path, place: Path) -> None:
    root = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=place.parent) as scratch:
        built = Path(scratch) / place.name
        command = [tool, *flags(), *(str(folder / name) for name in SOURCES), "-o", str(built)]
        command += [f"-I{root / 'include'}", f"-I{root / 'include/torch/csrc/api/include'}", f"-L{root / 'lib'}"]
        # Before the compiler's own: torch's OpenMP, whose threads are there already.
        command += ["-Wl,--as-needed", *map(str, sorted((root / "lib").glob("libgomp*.so*")))]
        command += ["-ltorch_cpu", "-ltorch", "-lc10"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(f"{tool} failed: {done.stderr.strip()[-600:]}")
        built.replace(place)
