"""Drivers and programs of Postgres, without and through the proxy."""
