"""The prefix index: stored blocks found again by the tokens they hold.

A tree with a block in each node, whose children are told apart by their own tokens, all of them compared: a path from a
root spells a text, so a hit is that text and no other. The root stands for everything else that keys and values depend
on (the adapter and its version) and for who may see them (a tenant's salt).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from unspool.cache.blocks import Blocks

__all__ = ["Node", "PrefixIndex"]

Tokens = tuple[int, ...]


class Node:
    """A full block, or a root, which has none.

    Attributes:
        parent: the node of the tokens before, `None` for a root.
        tokens: what the block holds.
        blocks: its number in each layer group.
        children: what follows, by tokens.
        users: live rows that hold the block (or began at the root).
        key: a root's key.
    """

    __slots__ = ("blocks", "children", "key", "parent", "tokens", "users")

    def __init__(self, parent: Node | None, tokens: Tokens, blocks: Sequence[int], key: Hashable = None) -> None:
        self.parent = parent
        self.key = key
        self.tokens = tokens
        self.blocks = tuple(blocks)
        self.children: dict[Tokens, Node] = {}
        self.users = 0


class PrefixIndex:
    """Full blocks by their tokens. It holds one reference to each, and gives up the least recently used ones.

    A row that uses a node uses those before it too, so a node without users has none after it either: what is idle can
    be given up from the leaves.

    Args:
        pools: the blocks of every layer group.
    """

    def __init__(self, pools: Sequence[Blocks]) -> None:
        self._pools = pools
        self._roots: dict[Hashable, Node] = {}
        self._idle: OrderedDict[Node, None] = OrderedDict()  # least recently used first, children before parents
        self._size = 0

    def __len__(self) -> int:
        """How many blocks (of each layer group) are indexed."""
        return self._size

    @property
    def idle(self) -> int:
        """How many of them no row uses."""
        return len(self._idle)

    def root(self, key: Hashable) -> Node:
        """Where texts under `key` begin."""
        node = self._roots.get(key)
        if node is None:
            node = self._roots[key] = Node(None, (), (), key)
        return node

    def find(self, node: Node, tokens: list[int], start: int, stop: int, size: int) -> list[Node]:
        """The nodes that follow `node` along `tokens[start:stop]`, in whole blocks of `size`."""
        found = []
        for begin in range(start, stop - size + 1, size):
            child = node.children.get(tuple(tokens[begin : begin + size]))
            if child is None:
                break
            found.append(child)
            node = child
        return found

    def use(self, nodes: Sequence[Node]) -> None:
        """A row begins to use `nodes`, a path from its root downwards, which it then holds references to as well."""
        for node in nodes:
            node.users += 1
            self._idle.pop(node, None)

    def add(self, parent: Node, tokens: Tokens, blocks: Sequence[int]) -> Node:
        """Index a block after `parent`, used by the row that computed it.

        Where these tokens are indexed already, that node is the one to use, and its blocks may be others.
        """
        node = parent.children.get(tokens)
        if node is None:
            node = parent.children[tokens] = Node(parent, tokens, blocks)
            for pool, block in zip(self._pools, blocks, strict=True):
                pool.share((block,))
            self._size += 1
        self.use((node,))
        return node

    def leave(self, nodes: Sequence[Node]) -> None:
        """A row stops using `nodes`, a path from its root downwards."""
        for node in reversed(nodes):
            node.users -= 1
            if node.parent is None:
                self._drop_root(node)
            elif not node.users:
                self._idle[node] = None

    def give_up(self, count: int) -> int:
        """Forget up to `count` idle blocks (of each layer group), the least recently used first; how many it were."""
        given = 0
        while given < count and self._idle:
            node, _ = self._idle.popitem(last=False)
            self._forget(node)
            given += 1
        return given

    def forget(self, nodes: Sequence[Node]) -> int:
        """Forget those of `nodes`, a path downwards, that are idle and lead nowhere; how many it were."""
        given = 0
        for node in reversed(nodes):
            if node in self._idle and not node.children:
                del self._idle[node]
                self._forget(node)
                given += 1
        return given

    def _forget(self, node: Node) -> None:
        assert node.parent is not None and not node.children, "children are idle before their parents"
        del node.parent.children[node.tokens]
        for pool, block in zip(self._pools, node.blocks, strict=True):
            pool.drop((block,))
        self._size -= 1
        if node.parent.parent is None:
            self._drop_root(node.parent)

    def _drop_root(self, root: Node) -> None:
        """Forget a root that nothing follows and nobody uses."""
        if not root.users and not root.children:
            self._roots.pop(root.key, None)
