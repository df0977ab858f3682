"""The decoder: one graph for every family, its configuration, rotary tables and cache."""
