"""The proxy and its parsers before bytes that nobody should send."""
