"""Build the null GPU beside a CUDA build of PyTorch; see null_gpu.c.

    python tests/null_gpu/build.py FOLDER [TORCH_VERSION]

makes FOLDER/venv with that PyTorch (about 3 GB, Linux, a C compiler) and what requirements.txt and
requirements-dev.txt name, and FOLDER/lib with the library. tests/test_null_gpu.py uses them if the
environment variable NULL_GPU_FOLDER names the folder.
"""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ASKED = re.compile(r"(?:__)?(?:cuda|cublas|nccl)[A-Z_]\w*")  # prefixes of functions without a home
HOST_DEFINES = """#pragma once
#define __DEVICE_TYPES_H__
"""
EMPTY = "__device_builtin__ __cudart_builtin__ __host__ __device__ CUDARTAPI CUDARTAPI_CDECL"
EMPTY += " __device_builtin_texture_type__ __device_builtin_surface_type__"
ALIGNED = "#define {0}(bytes) __attribute__((aligned(bytes)))\n"


def environment(folder: Path, card: str) -> dict[str, str]:
    """The environment variables of a process that sees a null GPU of this name, see null_gpu.c."""
    lib = str(folder / "lib")
    preloaded = {"LD_PRELOAD": f"{lib}/libcuda.so.1", "LD_LIBRARY_PATH": lib}
    return os.environ | preloaded | {"TRITON_LIBCUDA_PATH": lib, "NULL_GPU": card}


def output(*words: object) -> str:
    """What a command prints. Raises: CalledProcessError if it fails."""
    return subprocess.run([*map(str, words)], check=True, capture_output=True, text=True).stdout


def install(folder: Path, torch_version: str) -> Path:
    """A virtual environment with a CUDA build of PyTorch. Returns: its Python."""
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        venv.create(folder / "venv", with_pip=True)
    pip = [python, "-m", "pip", "install", "-q"]
    subprocess.run([*map(str, [*pip, f"torch=={torch_version}"])], check=True)
    needed = [part for name in ("", "-dev") for part in ("-r", ROOT / f"requirements{name}.txt")]
    subprocess.run([*map(str, [*pip, *needed])], check=True)
    return python


def symbols(library: Path, *options: str) -> set[str]:
    """The names that a library defines, or with --undefined-only those that it asks for."""
    lines = output("nm", "-D", *options, library).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines}


def build(python: Path, folder: Path) -> Path:
    """Compile the library for the PyTorch of an environment. Returns: its folder."""
    site = Path(output(python, "-c", "import torch; print(torch.__file__)").strip()).parents[1]
    lib, include = folder / "lib", folder / "include"
    lib.mkdir(parents=True, exist_ok=True)
    (include / "crt").mkdir(parents=True, exist_ok=True)
    defines = HOST_DEFINES + "".join(f"#define {name}\n" for name in EMPTY.split())
    defines += "".join(map(ALIGNED.format, ("__align__", "__builtin_align__")))
    (include / "crt" / "host_defines.h").write_text(defines + "#define __location__(a)\n")
    headers = next(site.glob("nvidia/**/driver_types.h")).parent
    asked = set[str]()
    for library in (site / "torch" / "lib").glob("*.so"):
        asked |= {name for name in symbols(library, "--undefined-only") if ASKED.fullmatch(name)}
    own = set(re.findall(r"^[^ /#}].*?\b\**(\w+)\(", (HERE / "null_gpu.c").read_text(), re.M))
    stubs = "".join(f"OK({name})\n" for name in sorted(asked - own))
    (include / "stubs.h").write_text(stubs)
    words = ["gcc", "-O1", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", f"-I{include}"]
    output(*words, f"-I{headers}", HERE / "null_gpu.c", "-o", lib / "libcuda.so.1", "-ldl")
    (lib / "libcuda.so").unlink(missing_ok=True)
    (lib / "libcuda.so").symlink_to("libcuda.so.1")
    return lib


def main() -> None:
    """See the module's text."""
    folder = Path(sys.argv[1]).resolve()
    print(build(install(folder, sys.argv[2] if len(sys.argv) > 2 else "2.11.0"), folder))


if __name__ == "__main__":
    main()
