"""Rules of the Postgres protocol: no sockets, no clock, no asyncio."""
