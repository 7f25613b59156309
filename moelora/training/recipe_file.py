"""The YAML of recipes and `--set`: as people write it, and small enough that nobody waits for it."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from ..files.opening import NotReadableError, open_regular
from ..schema import is_text, shorten

MOST_BYTES = 200_000  # PyYAML takes seconds for more
MOST_VALUES = 50_000
DEEPEST = 50
MOST_BITS = 4096  # of a whole number; beyond some it can be neither printed nor computed with


class _Loader(yaml.SafeLoader):
    """`2e-4` is a number, `no` is a word, and a key given twice is an error, not a loss.

    What no recipe needs is refused where it stands: deep nesting, anchors that hold themselves or stand for more values
    than a recipe has, values that their tag does not fit, zero bytes and halves of characters.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # by id of a node that was read: it and all that is in it

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._depth += 1
        if self._depth > DEEPEST:
            raise self._refusal(f"lists and mappings lie in each other more than {DEEPEST} levels deep")
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias and id(node) not in self._sizes:  # it stands within what it stands for
            raise self._refusal("an anchor holds itself")
        if node is not None and not is_alias:
            self._measure(node)
        return node

    def _measure(self, node: yaml.Node) -> None:
        """Count what a node stands for: the nodes are as many as the text is long, what aliases stand for is not."""
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        inside = (part for item in parts for part in (item if isinstance(item, tuple) else (item,)))
        self._sizes[id(node)] = size = 1 + sum(self._sizes[id(part)] for part in inside)
        if size > MOST_VALUES:
            raise self._refusal(f"holds more than {MOST_VALUES:,} values")

    def _refusal(self, problem: str) -> ConstructorError:
        return ConstructorError(None, None, problem, self.get_mark())

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError) as error:  # `!!int x`, the 45th of a month
            raise ConstructorError(None, None, f"no {node.tag.rpartition(':')[2]}: {error}", node.start_mark) from None

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        value = super().construct_scalar(node)
        if isinstance(value, str) and (fix := is_text(value)):
            raise ConstructorError(None, None, fix, node.start_mark)
        return value

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MOST_BITS or (value := super().construct_yaml_int(node)).bit_length() > MOST_BITS:
            raise ConstructorError(None, None, f"a whole number of more than {MOST_BITS} bits", node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        keys = Counter(key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode))
        for key, count in keys.items():
            if count > 1:
                raise ConstructorError(None, None, f"the key `{shorten(key)}` is given {count} times", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def parse_yaml(text: str) -> Any:
    """A value from YAML.

    Raises:
        NotReadableError: it is no YAML, or holds what no recipe needs.
    """
    if len(text) > MOST_BYTES:
        raise NotReadableError(f"longer than {MOST_BYTES:,} characters")
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise NotReadableError(f"not readable as YAML: {error}") from None


def read_yaml(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        NotReadableError: it is no regular file, or holds what [`parse_yaml`] refuses.
        OSError: it cannot be opened.
    """
    with open_regular(path) as stream:
        content = stream.read(4 * MOST_BYTES + 1)  # a character has four bytes at most
    try:
        return parse_yaml(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise NotReadableError(f"not readable as YAML: {error}") from None
