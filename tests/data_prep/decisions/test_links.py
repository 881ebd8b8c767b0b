"""Links and components: what hangs together, and as few links as say so."""

from __future__ import annotations

import numpy as np

from data_prep.decisions.links import chain, components, join


def flood(nodes: int, links: np.ndarray) -> list[set[int]]:
    """Components by walking from node to node."""
    left, found = set(range(nodes)), []
    while left:
        seen, border = set(), [min(left)]
        while border:
            node = border.pop()
            if node not in seen:
                seen.add(node)
                border += [int(b if a == node else a) for a, b in links if node in (a, b)]
        left -= seen
        found.append(seen)
    return found


def test_chain_links_equal_values():
    assert {tuple(pair) for pair in chain(np.array([5, 3, 5, 5, 3])).tolist()} == {(0, 2), (2, 3), (1, 4)}
    assert chain(np.empty(0)).shape == (0, 2)


def test_components_are_numbered_in_the_order_in_which_they_appear():
    rng = np.random.default_rng(0)
    links = rng.integers(0, 60, (40, 2))
    found = components(60, [links[:25], links[25:]])
    expected = flood(60, links)
    assert len(expected) > 20
    for number, nodes in enumerate(expected):
        assert set(np.flatnonzero(found == number)) == nodes
    assert components(3, []).tolist() == [0, 1, 2]


def test_joining_says_which_links_it_took():
    rng = np.random.default_rng(1)
    before, _ = join(np.arange(40), rng.integers(0, 40, (12, 2)))
    links = rng.integers(0, 40, (60, 2))
    after, needed = join(before, links)
    assert len(needed) == len(set(before.tolist())) - len(set(after.tolist()))
    again, _ = join(before, links[needed])
    assert np.array_equal(components(40, [chain(again)]), components(40, [chain(after)]))
    assert np.array_equal(components(40, [chain(before), links]), components(40, [chain(after)]))
