"""To a cluster: what an overlay renders to, what it asks of the cluster, and its way to being ready."""
