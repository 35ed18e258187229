"""The extensions, their one directive table and two switches; no more."""

import os
import sys

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

EXTENSIONS = (
    "_accept",
    "_bucket",
    "_client",
    "_connection",
    "_extended",
    "_fingerprint",
    "_flights",
    "_listen",
    "_loan",
    "_naming",
    "_pool",
    "_reactor",
    "_replies",
    "_server",
    "_simple",
    "_statements",
    "_traffic",
    "_usage",
    "_views",
    "_wire",
)
DIRECTIVES = {
    "language_level": 3,
    "embedsignature": False,
    "auto_pickle": False,
    "autotestdict": False,
}
DEBUG = os.environ.get("OGELPROXY_DEBUG") == "1"
SANITIZE = os.environ.get("OGELPROXY_SANITIZE") == "1"

NO_COMPILER = (
    "ogelproxy needs a C compiler and Python's headers to build its data plane. "
    "Debian, Ubuntu: apt-get install gcc python3-dev; "
    "Fedora: dnf install gcc python3-devel; macOS: xcode-select --install."
)


class BuildExtensions(build_ext):
    """Turn a missing compiler into one sentence that says what to install."""

    def run(self) -> None:
        try:
            super().run()
        except (BaseError, OSError) as error:
            sys.exit(f"{NO_COMPILER}\n(the compiler said: {error})")


flags = ["-O1", "-g"] if DEBUG or SANITIZE else ["-O2"]
# What Cython generates adds 0 to NULL, which is harmless and, in C, undefined.
sanitizer = (
    ["-fsanitize=address,undefined", "-fno-sanitize=pointer-overflow"]
    if SANITIZE
    else []
)
setup(
    cmdclass={"build_ext": BuildExtensions},
    ext_modules=cythonize(
        [
            Extension(
                f"ogelproxy.{name}",
                [f"ogelproxy/{name}.pyx"],
                extra_compile_args=flags + sanitizer,
                extra_link_args=sanitizer,
            )
            for name in EXTENSIONS
            if os.path.exists(f"ogelproxy/{name}.pyx")
        ],
        build_dir="build/checked" if SANITIZE else "build/cython",
        compiler_directives=DIRECTIVES | {"linetrace": DEBUG, "nonecheck": SANITIZE},
        nthreads=os.cpu_count() or 1,
    ),
)
