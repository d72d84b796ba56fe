"""Keeps what was computed for texts, in a tree over tokens.

It is a radix tree over token ids, under a budget of tokens. A node holds a run of tokens and what
was computed for them (a segment), so a prefix that many texts share is kept once. Tokens are
compared themselves, never their hashes. Texts of different namespaces share nothing.

What goes first, where room is needed, are runs that nothing continues: answers before user turns
before system prompts, and of equal ones the one that was longest not used.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Generic, Protocol, Self, TypeVar


class Kind(IntEnum):
    """Says what a run of tokens is; the lowest goes first."""

    ANSWER = 0
    USER = 1
    SYSTEM = 2


class Segment(Protocol):
    """Holds what was computed for a run of tokens."""

    def split(self, length: int) -> tuple[Self, Self]:
        """Return the first ``length`` tokens' part, and the rest.

        Neither keeps the other's memory.
        """
        ...


S = TypeVar("S", bound=Segment)
Ends = Seq[tuple[int, Kind]]
"""Where the kinds of a text end, ascending: ``[(system_end, SYSTEM), (prompt_end, USER)]``. What
comes after the last end is an answer.
"""


@dataclass(eq=False)
class Node(Generic[S]):
    """Holds a run of tokens below what its parent holds.

    Attributes:
        tokens: Tokens of the run; none in a root.
        segment: Segment that was computed for them; None in a root.
        kind: Kind of its last token.
        used: Time of its last use, on the clock of the cache.
        children: Nodes that go on, by their first token.
        parent: Node before it; None in a root, and in a node that was evicted.
    """

    tokens: list[int]
    segment: S | None
    kind: Kind
    parent: Node[S] | None
    used: int = 0
    children: dict[int, Node[S]] = field(default_factory=dict)


@dataclass(frozen=True)
class Match(Generic[S]):
    """Tells how much of a text is kept.

    Attributes:
        length: Tokens of the longest prefix.
        pieces: Its segments in order, each with the number of its tokens that belong to it.
    """

    length: int
    pieces: tuple[tuple[S, int], ...]


class PrefixCache(Generic[S]):
    """Keeps prefixes of texts up to a number of tokens.

    For one thread.

    Args:
        max_tokens: Most tokens that are kept, in all namespaces together.

    Attributes:
        num_tokens: Tokens that are kept.
        num_evicted: Tokens that have made room for others.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.num_tokens = self.num_evicted = 0
        self._roots: dict[Hashable, Node[S]] = {}
        self._leaves: list[tuple[int, int, int, Node[S]]] = []
        self._clock = self._serial = 0
        self._has_empty = False

    def match(self, namespace: Hashable, tokens: Seq[int]) -> Match[S]:
        """Find the longest prefix of ``tokens`` that is kept.

        It counts as used.
        """
        self._clock += 1
        pieces: list[tuple[S, int]] = []
        for node, length in self._walk(namespace, tokens):
            node.used = self._clock
            assert node.segment is not None
            pieces.append((node.segment, length))
        return Match(sum(length for _, length in pieces), tuple(pieces))

    def insert(
        self, namespace: Hashable, tokens: Seq[int], ends: Ends, read: Callable[[int, int], S]
    ) -> int:
        """Keep as much of a text as the budget allows.

        Args:
            namespace: Name within which texts share prefixes.
            tokens: Tokens of the text.
            ends: Ends of the kinds of its tokens.
            read: Function that gives the segment of ``tokens[start:stop]``; asked only for what is
                not kept yet.

        Returns:
            Tokens of the text that were added.
        """
        self._clock += 1
        path = self._path(namespace, tokens)
        matched = sum(len(node.tokens) for node in path)
        self._use(path, ends)
        added = self._make_room(min(len(tokens), self.max_tokens) - matched, path)
        node = path[-1]
        try:
            for start, stop, kind in _runs(ends, matched, matched + added):
                node = self._append(node, list(tokens[start:stop]), read(start, stop), kind)
        finally:
            if not path[0].children:
                del self._roots[namespace]
        return added

    def nodes(self) -> Iterator[Node[S]]:
        """Yield all nodes but the roots."""
        todo = [child for root in self._roots.values() for child in root.children.values()]
        while todo:
            node = todo.pop()
            todo += node.children.values()
            yield node

    def _walk(self, namespace: Hashable, tokens: Seq[int]) -> Iterator[tuple[Node[S], int]]:
        """Yield the nodes that agree with ``tokens``, and how far.

        How far is a number of tokens; the last node may agree only in part.
        """
        node, position = self._roots.get(namespace), 0
        while node is not None and position < len(tokens):
            node = node.children.get(tokens[position])
            if node is None:
                return
            stop = position + len(node.tokens)
            length = common_prefix(node.tokens, tokens[position:stop])
            yield node, length
            if length < len(node.tokens):
                return
            position = stop

    def _path(self, namespace: Hashable, tokens: Seq[int]) -> list[Node[S]]:
        """Return the root and the nodes of the longest prefix.

        The last node is split where the prefix ends.
        """
        root = self._roots.setdefault(namespace, Node([], None, Kind.SYSTEM, None))
        path = [root]
        for node, length in list(self._walk(namespace, tokens)):
            path.append(self._split(node, length) if length < len(node.tokens) else node)
        return path

    def _split(self, node: Node[S], length: int) -> Node[S]:
        """Put a node with the first ``length`` tokens above the rest.

        That node is returned.
        """
        assert node.segment is not None
        assert node.parent is not None
        first, rest = node.segment.split(length)
        upper = Node(node.tokens[:length], first, node.kind, node.parent, node.used)
        node.parent.children[upper.tokens[0]] = upper
        node.tokens, node.segment, node.parent = node.tokens[length:], rest, upper
        upper.children[node.tokens[0]] = node
        return upper

    def _use(self, path: list[Node[S]], ends: Ends) -> None:
        """Count a path as used.

        What is a prompt now was an answer before, so kinds only rise.
        """
        position = 0
        for node in path[1:]:
            position += len(node.tokens)
            node.used = self._clock
            node.kind = max(node.kind, _kind_at(ends, position - 1))

    def _append(self, parent: Node[S], tokens: list[int], segment: S, kind: Kind) -> Node[S]:
        node = Node(tokens, segment, kind, parent, self._clock)
        parent.children[tokens[0]] = node
        self.num_tokens += len(tokens)
        self._note_leaf(node)
        return node

    def _make_room(self, wanted: int, path: list[Node[S]]) -> int:
        """Evict until ``wanted`` tokens fit; return how many fit then.

        Fewer fit where nothing is left but the path.
        """
        kept = {id(node) for node in path}
        passed: list[Node[S]] = []
        while wanted > self.max_tokens - self.num_tokens:
            node = self._next_leaf()
            if node is None:
                break
            if id(node) in kept:
                passed.append(node)
            else:
                self._evict(node)
        for node in passed:
            self._note_leaf(node)
        self._drop_empty(path[0])
        return max(0, min(wanted, self.max_tokens - self.num_tokens))

    def _evict(self, node: Node[S]) -> None:
        parent = node.parent
        assert parent is not None
        del parent.children[node.tokens[0]]
        node.parent, node.segment = None, None
        self.num_tokens -= len(node.tokens)
        self.num_evicted += len(node.tokens)
        if parent.children:
            return
        if parent.parent is not None:
            self._note_leaf(parent)
        else:
            self._has_empty = True

    def _drop_empty(self, kept: Node[S]) -> None:
        """Forget namespaces of which nothing is left."""
        if self._has_empty:
            self._has_empty = False
            self._roots = {
                name: root for name, root in self._roots.items() if root.children or root is kept
            }

    def _note_leaf(self, node: Node[S]) -> None:
        self._serial += 1
        heapq.heappush(self._leaves, (node.kind, node.used, self._serial, node))

    def _next_leaf(self) -> Node[S] | None:
        """Take the leaf that goes first.

        Entries are from when they were noted, and may have changed since.
        """
        while self._leaves:
            kind, used, _, node = heapq.heappop(self._leaves)
            if node.parent is None or node.children:
                continue
            if (kind, used) == (node.kind, node.used):
                return node
            self._note_leaf(node)
        return None


def common_prefix(first: Seq[int], second: Seq[int]) -> int:
    """Count the tokens that two texts begin with in common."""
    low, high = 0, min(len(first), len(second))
    if first[:high] == second[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _kind_at(ends: Ends, index: int) -> Kind:
    return next((kind for end, kind in ends if index < end), Kind.ANSWER)


def _runs(ends: Ends, start: int, stop: int) -> Iterator[tuple[int, int, Kind]]:
    """Cut ``start .. stop`` where kinds end."""
    for end, kind in (*ends, (stop, Kind.ANSWER)):
        if start < min(end, stop):
            yield start, min(end, stop), kind
            start = min(end, stop)
