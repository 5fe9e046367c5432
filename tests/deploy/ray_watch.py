"""What Ray says of its cluster, as a JSON object a line: ``python -m tests.deploy.ray_watch HOST:PORT``.

nodes     type |-> how many that are alive, the head's beside those that the autoscaler has started
pending   what waits for room: of each placement group the resources of its bundles
free      resource |-> what nobody has reserved, of all nodes
"""

from __future__ import annotations

import json
import sys
import threading
from collections import Counter

from ray.autoscaler.v2.schema import ClusterStatus
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.exceptions import RayError

INTERVAL_S = 0.3


def said(status: ClusterStatus) -> dict[str, object]:
    """One look."""
    nodes = [*status.active_nodes, *status.idle_nodes]
    used = {usage.resource_name: usage.total - usage.used for usage in status.cluster_resource_usage}
    demands = status.resource_demands.placement_group_demand
    return {
        "nodes": Counter(node.ray_node_type_name for node in nodes),
        "pending": [bundle.bundle for demand in demands for bundle in demand.bundles_by_count],
        "free": {name: amount for name, amount in sorted(used.items()) if name in ("CPU", "decode", "prefill")},
    }


def main(address: str) -> None:
    """Look until the process is ended. A head too busy to answer in time is asked again."""
    pause = threading.Event()
    while not pause.wait(INTERVAL_S):
        try:
            status = get_cluster_status(address)
        except RayError as error:
            print(error, flush=True)
            continue
        print(json.dumps(said(status)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
