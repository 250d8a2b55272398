# SPDX-License-Identifier: Apache-2.0
"""Clusters: one architecture, in one data centre, and a rule about N+1."""

from sqlalchemy import Connection, select, update

from ppec_contract.api_catalogue import ClusterUpdate, ClusterView
from ppec_orchestrator.store.catalogue import Catalogue, id_of
from ppec_orchestrator.store.tables import cluster, datacentre, host, rack

CLUSTERS = Catalogue(
    code="cluster",
    word="cluster",
    table=cluster,
    view=ClusterView,
    references={"datacentre": datacentre},
)


def update_cluster(conn: Connection, name: str, wanted: ClusterUpdate) -> ClusterView:
    """Raises `cluster.not_found`. Whoever plans from now on keeps to the rule: its hosts are other ones than those of a
    plan that was made before, and was not carried out yet."""
    cluster_id = id_of(conn, cluster, name, alone=True)
    before = CLUSTERS.get(conn, name)
    if before.n_plus_one == wanted.n_plus_one or before.n_plus_one.mode == wanted.n_plus_one.mode == "off":
        return before
    rule = wanted.n_plus_one.model_dump(mode="json")
    conn.execute(update(cluster).where(cluster.c.id == cluster_id).values(n_plus_one=rule))
    racks = select(rack.c.id).where(rack.c.cluster_id == cluster_id)
    standing = host.c.rack_id.in_(racks)
    # In the order in which everybody locks hosts.
    conn.execute(select(host.c.id).where(standing).order_by(host.c.id).with_for_update(key_share=True))
    conn.execute(update(host).where(standing).values(generation=host.c.generation + 1))
    return CLUSTERS.get(conn, name)
