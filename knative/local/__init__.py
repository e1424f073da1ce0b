"""A Knative Service on one machine: the same manifests, Knative's decisions, processes instead of containers.

request → activator → revision → pod; the revision's load → autoscaler → pods. For one machine and for development.
"""
