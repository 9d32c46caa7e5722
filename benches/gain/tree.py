"""A project's tree: real sources with a Makefile of our own, and the edits that a benchmark makes.

Whatever is said of a header ("core", "part", "leaf") is found by counting who includes it, so a
project is named by where its sources are and how they are compiled, and by nothing else. An edit is
a mark: text at the end of a file, which ends up in every object that reads the file. Without its
marks a tree is as it was, and so are its actions.
"""

import dataclasses
import os
import re
import shutil
import subprocess
from pathlib import Path

GENERATED = "bench_generated.h"
TEMPLATE = "bench_generated.in"
ADDED = "bench_added.h"
OUTPUT = "out.so"
# What a user has, and the same on every machine: it is part of each Command.
PATH = "/usr/local/bin:/usr/bin:/bin"


@dataclasses.dataclass(frozen=True)
class Project:
    """Where a project's sources are in the crate that carries them, and how they are compiled."""

    name: str
    title: str
    crate: str
    version: str
    root: str
    folders: tuple
    sources: str
    compiler: str
    flags: str
    without: tuple = ()


PROJECTS = {
    project.name: project
    for project in [
        Project(
            name="lua",
            title="Lua 5.4",
            crate="lua-src",
            version="551.1.0",
            root="lua-5.4.9",
            folders=(".",),
            sources="*.c",
            compiler="gcc",
            flags="-std=gnu99 -O1 -fPIC -DLUA_USE_POSIX -I.",
        ),
        Project(
            name="mbedtls",
            title="Mbed TLS 2.28",
            crate="mbedtls-sys-auto",
            version="2.28.15",
            root="vendor",
            folders=("include", "library"),
            sources="library/*.c",
            compiler="gcc",
            flags="-O1 -fPIC -I. -Iinclude -Ilibrary",
        ),
        Project(
            name="physx",
            title="PhysX 5 geometry (C++)",
            crate="physx-sys",
            version="0.11.5",
            root="physx/physx",
            folders=("include", "source/geomutils", "source/common", "source/foundation", "source/lowlevel"),
            sources="source/geomutils/src/**/*.cpp",
            compiler="g++",
            flags="-std=c++14 -O0 -fPIC -w -DNDEBUG -DPX_PHYSX_STATIC_LIB -I. -Iinclude -Isource/geomutils/include"
            " -Isource/common/include -Isource/common/src -Isource/foundation/include -Isource/lowlevel/api/include"
            " -Isource/geomutils/src"
            + "".join(
                f" -Isource/geomutils/src/{folder}"
                for folder in "contact pcm mesh hf convex distance intersection sweep common gjk ccd cooking".split()
            ),
            without=("/pcm/", "/mesh/"),
        ),
    ]
}


def mark_in_code(path, text):
    """What a mark adds to a source or header: a string that every object keeps which reads it."""
    name = "bench_" + re.sub(r"\W", "_", path)
    return (
        f"\n#ifndef {name}_H\n#define {name}_H\n"
        f'static const char {name}[] __attribute__((used)) = "{text}";\n#endif\n'
    )


class Tree:
    """One copy of a project, at a state that is named by its marks."""

    def __init__(self, project, crates, folder):
        self.project = project
        self.folder = Path(folder)
        origin = Path(crates) / f"{project.crate}-{project.version}" / project.root
        if not origin.is_dir():
            origin = next(Path(crates).glob(f"{project.crate}-{project.version}*")) / project.root
        for part in project.folders:
            shutil.copytree(origin / part, self.folder / part, dirs_exist_ok=True)
        self.units = sorted(
            str(path.relative_to(self.folder))
            for path in self.folder.glob(project.sources)
            if not any(part in f"/{path.relative_to(self.folder)}" for part in project.without)
        )
        self._original = {}
        self._marks = {}
        self._write(TEMPLATE, mark_in_code(GENERATED, "base"))
        self._write(GENERATED, mark_in_code(GENERATED, "base"))
        # recc passes on no arguments of what is no compiler, so the script is the command.
        self._write("bench_generate.sh", f"#!/bin/sh\ncat {TEMPLATE} > {GENERATED}\n")
        (self.folder / "bench_generate.sh").chmod(0o755)
        self._write("NOTES.txt", "Read by no action.\n")
        self._write("bench_unused.h", "/* Included by nobody. */\n")
        self._write(ADDED, mark_in_code(ADDED, "base"))
        self._scan()
        with open(self.folder / self.part, "a") as header:
            header.write(f'\n#include "{GENERATED}"\n')
        self._scan()
        os.remove(self.folder / GENERATED)  # make has it made by an action
        self._write("Makefile", self._makefile())

    def _write(self, path, text):
        (self.folder / path).write_text(text)

    def _scan(self):
        """Who includes what, as the compiler says."""
        said = subprocess.run(
            [self.project.compiler, "-MM", *self.project.flags.split(), *self.units],
            cwd=self.folder,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        self.reads = {}
        for rule in said.replace("\\\n", " ").splitlines():
            source, *headers = rule.split(":", 1)[1].split()
            self.reads[os.path.normpath(source)] = sorted({os.path.normpath(header) for header in headers})
        readers = {}
        for headers in self.reads.values():
            for header in headers:
                if header != GENERATED:
                    readers[header] = readers.get(header, 0) + 1
        self.readers = readers
        ranked = sorted(readers, key=lambda header: (readers[header], header))
        if not hasattr(self, "part"):
            quarter = len(self.units) / 4
            self.core = ranked[-1]
            self.leaf = ranked[0]
            self.part = min(ranked[1:-1], key=lambda header: (abs(readers[header] - quarter), header))

    def _makefile(self):
        project = self.project
        objects = " ".join(self.object(unit) for unit in self.units)
        lines = [
            "RECC =\n",
            f"{OUTPUT}: {objects}\n\t$(RECC) {project.compiler} -shared -o $@ {objects}\n",
            f"{GENERATED}: {TEMPLATE} bench_generate.sh",
            f"\tRECC_FORCE_REMOTE=1 RECC_DEPS_OVERRIDE=bench_generate.sh,{TEMPLATE}"
            f" RECC_OUTPUT_FILES_OVERRIDE={GENERATED} $(RECC) ./bench_generate.sh\n",
        ]
        for unit in self.units:
            lines.append(f"{self.object(unit)}: {unit} {' '.join(self.reads[unit])} | {GENERATED}")
            lines.append(f"\t$(RECC) {project.compiler} {project.flags} -c {unit} -o $@\n")
        return "\n".join(lines)

    @staticmethod
    def object(unit):
        """The object that a unit is compiled to."""
        return os.path.splitext(unit)[0] + ".o"

    def set_marks(self, marks):
        """Puts the tree into the state that `marks` (path: text to add) says; others go."""
        for path in sorted(set(self._marks) | set(marks)):
            if self._marks.get(path) != marks.get(path):
                original = self._original.setdefault(path, (self.folder / path).read_text())
                self._write(path, original + marks.get(path, ""))
        self._marks = dict(marks)

    def touch(self):
        """Makes everything that is marked look changed again."""
        for path in self._marks:
            os.utime(self.folder / path)

    def clean(self):
        """Removes what was built."""
        for path in [*map(self.object, self.units), OUTPUT, GENERATED]:
            (self.folder / path).unlink(missing_ok=True)

    def output(self):
        """What was built, as bytes."""
        return (self.folder / OUTPUT).read_bytes()
