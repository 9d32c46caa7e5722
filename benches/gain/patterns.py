"""The changes that are measured: what each does to a tree, and what no build after it can beat."""

import dataclasses
from typing import Callable

from tree import ADDED, GENERATED, TEMPLATE, mark_in_code


@dataclasses.dataclass(frozen=True)
class Pattern:
    """One kind of change. `chain` names the actions, one after the other, that it takes at least."""

    name: str
    title: str
    marks: Callable
    chain: tuple = ("compile", "link")
    loss: bool = False
    """Whether primed is not expected to help."""
    new_include: bool = False
    """Whether what is read changes, too."""
    after: str | None = None
    """The pattern that it takes back, if it is none that a tree can begin with."""


def code(*paths_of):
    """A change of what is compiled, in the files that `paths_of` a tree are."""
    return lambda tree, nonce: {
        path: mark_in_code(path, nonce) for paths in paths_of for path in _listed(paths(tree))
    }


def _listed(paths):
    return [paths] if isinstance(paths, str) else paths


def _first(tree):
    return tree.units[0]


def _twentieth(tree):
    """One file of twenty, sources and headers, but not those that everybody reads."""
    files = tree.units + [path for path, readers in tree.readers.items() if readers <= len(tree.units) / 4]
    return sorted(files)[7::20]


def _unrelated(tree, nonce):
    marks = code(_first)(tree, nonce)
    return marks | {"NOTES.txt": nonce, "bench_unused.h": f"/* {nonce} */\n"}


def _added(tree, nonce):
    return {ADDED: mark_in_code(ADDED, nonce), tree.part: f'\n#include "{ADDED}"\n'}


PATTERNS = {
    pattern.name: pattern
    for pattern in [
        Pattern("leaf-source", "a source", code(_first)),
        Pattern("leaf-header", "a header that few include", code(lambda tree: tree.leaf)),
        Pattern("core-header", "a header that most include", code(lambda tree: tree.core)),
        Pattern("two-headers", "two headers", code(lambda tree: tree.leaf, lambda tree: tree.part)),
        Pattern(
            "generated-header",
            "the template of a generated header",
            lambda tree, nonce: {TEMPLATE: mark_in_code(GENERATED + "_round", nonce)},
            chain=("generate", "compile", "link"),
        ),
        Pattern(
            "comment",
            "a comment in a header",
            lambda tree, nonce: {tree.part: f"/* {nonce} */\n"},
            chain=("compile",),
        ),
        Pattern("unrelated", "a source, and files that nobody reads", _unrelated),
        Pattern("branch-switch", "a branch switch: 5 % of the files", code(_twentieth)),
        Pattern(
            "reverted",
            "a header, back to what it was",
            lambda tree, nonce: {},
            chain=(),
            loss=True,
            after="core-header",
        ),
        Pattern("added-include", "a header gains an #include", _added, loss=True, new_include=True),
        Pattern(
            "dropped-include",
            "a header loses an #include",
            lambda tree, nonce: {tree.part: mark_in_code(tree.part, nonce)},
            loss=True,
            new_include=True,
            after="added-include",
        ),
        Pattern("clean", "nothing, all built anew", lambda tree, nonce: {}, chain=(), loss=True),
        Pattern("untouched", "nothing, a header's time is new", lambda tree, nonce: {}, chain=(), loss=True),
        Pattern("first", "the first build", lambda tree, nonce: {}, chain=("generate", "compile", "link"), loss=True),
    ]
}
