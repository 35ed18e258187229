"""ogelproxy: a multi-tenant Postgres proxy.

Read it in the order of a query's journey: listener, client, login (startup,
auth, tenants, gate), relay (limiter, router, pool, server), usage.
"""
