"""What of a graph runs for an image, found by data flow, and how long what it gives is alive.

What depends on constants alone is computed once, beforehand; what nothing reads is left out.
"""

from callbacks.graph import Graph, Node, Value
from callbacks.op_formulas import VIEWS


def fold_constants(graph: Graph) -> list[Node]:
    """Mark what depends on constants alone as fixed, and give the nodes that depend on the image.

    Args:
        graph: The network; its values are marked.
    """
    live = []
    for node in graph.nodes:
        given = [value for value in node.inputs if value is not None]
        if not all(value.fixed for value in given) or any(out.memory().written for out in node.outputs):
            live.append(node)
            continue
        for out in node.outputs:
            out.fixed = True
            out.literal = out.literal or all(value.literal for value in given)
            out.names = tuple(dict.fromkeys(name for value in given for name in value.names))
            if given and node.op in VIEWS and out.numel == given[0].numel:
                out.root = given[0].original()
    return live


def needed(nodes: list[Node], outputs: tuple[Value, ...]) -> list[Node]:
    """Leave out what nothing reads: a deployed network does not run it.

    Args:
        nodes: In the order in which they run.
        outputs: What the network gives.
    """
    wanted, memories, kept = {id(value) for value in outputs}, {id(value.memory()) for value in outputs}, []
    for node in reversed(nodes):
        # What is written in place matters where anything that lives in that memory is read later.
        written = node.in_place and id(node.out.memory()) in memories
        if written or any(id(value) in wanted for value in node.outputs):
            read = [value for value in node.inputs if value is not None]
            wanted |= {id(value) for value in read}
            memories |= {id(value.memory()) for value in read}
            kept.append(node)
    return kept[::-1]


def lifetimes(nodes: list[Node], graph: Graph) -> list[int]:
    """Bytes alive while each node runs: from where memory is first written to where it is last read.

    Args:
        nodes: What runs, in order.
        graph: The network, for its images and results: the caller holds the former and takes the latter.
    """
    last: dict[int, int] = {}
    for index, node in enumerate(nodes):
        for value in (*node.inputs, *node.outputs):
            if value is not None and not value.fixed:
                last[id(value.memory())] = index
    last |= {id(value.memory()): len(nodes) for value in (*graph.inputs, *graph.outputs)}
    alive = {id(value): value.bytes for value in graph.inputs}
    sizes = []
    for index, node in enumerate(nodes):
        alive |= {id(v.memory()): v.memory().bytes for v in node.outputs if not v.memory().fixed}
        sizes.append(sum(alive.values()))
        alive = {key: size for key, size in alive.items() if last.get(key, -1) > index}
    return sizes
