"""Tenants: who they are, what they may do, where their data is.

`model` holds the values, `store` the control plane's SQL, `vault` the encryption
of connection strings. `directory` is what the layers ask: `memory` in front of
Redis (`cache`, with records `seal`ed) in front of the store; `looks` gathers what is
asked into batches. `supplied` is the directory of an embedding service. Nothing here
knows a client, a socket of one, or how a credential is proven.
"""
