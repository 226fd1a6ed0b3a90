"""Loads, clients and servers for the scripts that measure serving."""
