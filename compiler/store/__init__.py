"""Files of a build: the cache of graphs and engines, its keys, and folders that appear whole."""
