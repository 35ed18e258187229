"""Tenants: who they are, what they may do, where their data is.

`model` holds the values, `store` the control plane's SQL, `vault` the encryption
of connection strings, `directory` the memory in front of the store. Nothing here
knows a client, a socket of one, or how a credential is proven.
"""
