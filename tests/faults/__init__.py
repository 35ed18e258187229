"""The proxy while something around it breaks."""
