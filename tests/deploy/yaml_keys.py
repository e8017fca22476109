"""The keys of a YAML text: where they stand, which of them lack a comment, and the text's data with one misspelt."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import yaml

Path = tuple[str | int, ...]


def key_lines(text: str) -> Iterator[tuple[Path, int]]:
    """Yield every key of every mapping of `text`, at any depth, as its path (document first) and its line from 0."""

    def walk(node: yaml.Node, path: Path) -> Iterator[tuple[Path, int]]:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                yield (*path, key.value), key.start_mark.line
                yield from walk(value, (*path, key.value))
        elif isinstance(node, yaml.SequenceNode):
            for place, value in enumerate(node.value):
                yield from walk(value, (*path, place))

    for place, document in enumerate(yaml.compose_all(text, Loader=yaml.SafeLoader)):
        yield from walk(document, (place,))


def uncommented(text: str) -> list[Path]:
    """Return the keys that have neither a comment on their line nor one right above, indented as they are."""
    lines = text.splitlines()
    ends = dict.fromkeys(range(len(lines)), 0)
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if token.end_mark.line in ends and token.end_mark.index > token.start_mark.index:
            ends[token.end_mark.line] = max(ends[token.end_mark.line], token.end_mark.column)

    def has_comment(line: int) -> bool:
        if lines[line][ends[line] :].strip().startswith("#"):
            return True
        above, here = lines[line - 1] if line else "", lines[line]
        indent = len(here) - len(here.lstrip())
        return above.startswith(" " * indent + "# ")

    return [path for path, line in key_lines(text) if not has_comment(line)]


def misspelt(documents: list[Any], path: Path) -> list[Any]:
    """Return a copy of `documents` in which the key at `path` has one letter too many."""
    documents = deepcopy(documents)
    parent: Any = documents
    for step in path[:-1]:
        parent = parent[step]
    key = path[-1]
    renamed = {f"{name}z" if name == key else name: value for name, value in parent.items()}
    parent.clear()
    parent.update(renamed)
    return documents
