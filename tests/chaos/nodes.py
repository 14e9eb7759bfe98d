"""A Ray cluster of several nodes on this machine, for runs that lose one of them.

Refuses to know which node is killed and when (target.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ray.cluster_utils import Cluster

HEAD_CPUS = 3  # the driver's node, which is never killed


@contextmanager
def cluster_of(*nodes_cpus: int) -> Iterator[Cluster]:
    """The head and a node for each of these numbers of CPUs; a run joins it by RAY_ADDRESS.

    While it is up, ray.init() of others on this machine joins it, too, unless told otherwise.
    """
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": HEAD_CPUS, "include_dashboard": False}
    )
    try:
        for cpus in nodes_cpus:
            cluster.add_node(num_cpus=cpus)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()
