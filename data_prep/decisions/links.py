"""Photos as nodes of a graph, pairs of photos as links, and the graph's connected components."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree


def chain(values: np.ndarray) -> np.ndarray:
    """Pairs of positions that link all positions of equal value in a chain: int64 [pairs, 2]."""
    order = np.argsort(values, kind="stable")
    equal = values[order[1:]] == values[order[:-1]]
    return np.stack([order[:-1][equal], order[1:][equal]], axis=1)


def join(component: np.ndarray, links: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge components along links.

    Args:
        component: Number of each node's component, int64 [N], below N.
        links: Pairs of nodes, int64 [pairs, 2].

    Returns:
        The new numbers, int64 [N], and the positions of the links that the merge needed, int64: fewer than there were
        components.
    """
    ends, position = np.unique(np.sort(component[links], axis=1), axis=0, return_index=True)
    # A spanning tree: the weights say which link an edge comes from; 0 would be no edge.
    shape = (len(component), len(component))
    tree = minimum_spanning_tree(coo_array((position + 1.0, (ends[:, 0], ends[:, 1])), shape=shape))
    _, joined = connected_components(tree, directed=False)
    return joined.astype(np.int64)[component], tree.data.astype(np.int64) - 1


def components(nodes: int, links: Iterable[np.ndarray]) -> np.ndarray:
    """Connected components, numbered in the order in which they first appear: int64 [nodes].

    Args:
        nodes: Number of nodes.
        links: Pairs of nodes, int64 [pairs, 2] each.
    """
    component, _ = join(np.arange(nodes), np.concatenate([np.empty((0, 2), dtype=np.int64), *links]))
    _, first, component = np.unique(component, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[component]
