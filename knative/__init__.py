"""Knative for Relight: the manifests a cluster gets, and what runs or simulates them on one machine."""
