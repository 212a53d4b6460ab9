"""The prefix index: stored blocks found again by the tokens they hold.

A tree with a block in each node, whose children are told apart by their own tokens, all of them compared: a path from a
root spells a text, so a hit is that text and no other. The root stands for everything else that keys and values depend
on (the adapter and its version) and for who may see them (a tenant's salt).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from unspool.cache.blocks import GONE, Blocks
from unspool.cache.layout import LayerGroup

__all__ = ["Node", "PrefixIndex"]

Tokens = tuple[int, ...]


class Node:
    """A full block, or a root, which has none.

    Attributes:
        parent: the node of the tokens before, `None` for a root.
        tokens: what the block holds.
        blocks: its number in each layer group; `GONE` where a group with a window gave it up.
        children: what follows, by tokens.
        users: live rows whose text goes through it.
        key: a root's key.
    """

    __slots__ = ("blocks", "children", "key", "parent", "tokens", "users")

    def __init__(self, parent: Node | None, tokens: Tokens, blocks: Sequence[int], key: Hashable = None) -> None:
        self.parent = parent
        self.key = key
        self.tokens = tokens
        self.blocks = list(blocks)
        self.children: dict[Tokens, Node] = {}
        self.users = 0


class PrefixIndex:
    """Full blocks by their tokens. They are kept (see `Blocks`) and given up when they were idle for longest.

    A group without a window needs all blocks of a text. Whoever refers to one refers to those before it too, so they
    become idle, and are given up, from the leaves. A group with a window needs the last ones only: those before may be
    given up, and the nodes go on standing for the text.

    Args:
        pools: the blocks of every layer group.
        groups: the layer groups.
        size: tokens in a block.
    """

    def __init__(self, pools: Sequence[Blocks], groups: Sequence[LayerGroup], size: int) -> None:
        self._pools = pools
        self._groups = groups
        self._size = size
        self._roots: dict[Hashable, Node] = {}
        self._nodes: list[dict[int, Node]] = [{} for _ in pools]  # by block

    def __len__(self) -> int:
        """How many blocks are indexed, in the layer group that has most."""
        return max(len(nodes) for nodes in self._nodes)

    def root(self, key: Hashable) -> Node:
        """Where texts under `key` begin."""
        node = self._roots.get(key)
        if node is None:
            node = self._roots[key] = Node(None, (), (), key)
        return node

    def find(self, root: Node, tokens: list[int], stop: int) -> list[Node]:
        """The nodes of the longest beginning of `tokens[:stop]` after which a row can go on."""
        size, node = self._size, root
        path: list[Node] = []
        usable = 0
        gaps = [0] * len(self._groups)  # blocks up to the last one that is gone
        for begin in range(0, stop - size + 1, size):
            child = node.children.get(tuple(tokens[begin : begin + size]))
            if child is None:
                break
            path.append(child)
            node, after = child, begin + size
            for index, block in enumerate(child.blocks):
                if block == GONE:
                    gaps[index] = len(path)
            if all(group.first_seen(after) >= gap * size for group, gap in zip(self._groups, gaps, strict=True)):
                usable = len(path)
        return path[:usable]

    def at(self, index: int, block: int) -> Node | None:
        """The node whose block in layer group number `index` is `block`."""
        return self._nodes[index].get(block)

    def tables(self, nodes: Sequence[Node]) -> list[list[int]]:
        """Block tables of a row that goes on after `nodes`, and now refers to their blocks."""
        tables = []
        for index, (group, pool) in enumerate(zip(self._groups, self._pools, strict=True)):
            unseen = group.first_seen(len(nodes) * self._size) // self._size
            table = [GONE] * unseen + [node.blocks[index] for node in nodes[unseen:]]
            pool.share(table)
            tables.append(table)
        return tables

    def use(self, nodes: Sequence[Node]) -> None:
        """The text of a live row goes through `nodes`, a path from its root downwards."""
        for node in nodes:
            node.users += 1

    def leave(self, nodes: Sequence[Node]) -> None:
        """It does no longer."""
        for node in nodes:
            node.users -= 1
        if nodes:
            self._prune(nodes[-1])

    def add(self, parent: Node, tokens: Tokens, blocks: Sequence[int]) -> Node:
        """Index a block after `parent`, for the live row that computed it.

        Where these tokens are indexed already, that node is the one to use, and its blocks may be others.
        """
        node = parent.children.get(tokens)
        if node is None:
            node = parent.children[tokens] = Node(parent, tokens, [GONE] * len(blocks))
        for index, block in enumerate(blocks):
            if node.blocks[index] == GONE != block:
                node.blocks[index] = block
                self._nodes[index][block] = node
                self._pools[index].keep(block)
        node.users += 1
        return node

    def give_up(self, index: int, count: int) -> int:
        """Make up to `count` idle blocks of layer group `index` free, idle for longest first; how many it were."""
        given, pool = 0, self._pools[index]
        while given < count and (block := pool.longest_idle) is not None:
            node = self._nodes[index][block]
            if self._groups[index].window is None:
                assert not node.children, "children are idle before their parents"
                self._forget(node)
            else:
                self._let_go(node, index)
                self._prune(node)
            given += 1
        return given

    def forget(self, nodes: Sequence[Node]) -> int:
        """Forget those of `nodes`, a path downwards, that are idle and lead nowhere; how many it were."""
        given = 0
        for node in reversed(nodes):
            if node.children or node.users or not self._is_known(node):
                continue
            if all(pool.is_idle(b) for pool, b in zip(self._pools, node.blocks, strict=True) if b != GONE):
                self._forget(node)
                given += 1
        return given

    def _is_known(self, node: Node) -> bool:
        return node.parent is not None and node.parent.children.get(node.tokens) is node

    def _forget(self, node: Node) -> None:
        for index in range(len(self._pools)):
            self._let_go(node, index)
        self._prune(node)

    def _let_go(self, node: Node, index: int) -> None:
        block = node.blocks[index]
        if block != GONE:
            node.blocks[index] = GONE
            del self._nodes[index][block]
            self._pools[index].let_go(block)

    def _prune(self, node: Node) -> None:
        """Take out a node that stands for nothing: no block, no row, no text that goes on; and so its parents."""
        while not node.users and not node.children and all(block == GONE for block in node.blocks):
            parent = node.parent
            if parent is None:
                self._roots.pop(node.key, None)
                return
            if parent.children.get(node.tokens) is node:
                del parent.children[node.tokens]
            node = parent
