"""Consoles in SQL: what operators and tenants may ask the proxy itself.

`operator` is the database `ogel` for operators' keys, with `tables` that it shows
and `commands` that it runs; `tenant` is `SHOW o7s.…` on a tenant's own connection.
`portals` is the extended protocol of both.
"""
