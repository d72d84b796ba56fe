"""``trimode cache``: what the cache of traced graphs and engines holds."""

from __future__ import annotations

import json
import sys

from trimode.compiler.cache import ContentCache, default_folder


def show_cache(*, clear: bool, as_json: bool) -> None:
    """Print folder, entries and bytes; with ``clear`` delete what no build is using first."""
    cache = ContentCache(default_folder(), limit_bytes=0)
    deleted = cache.prune() if clear else 0
    count, num_bytes = cache.usage()
    facts = {"folder": str(cache.folder), "entries": count, "num_bytes": num_bytes, "deleted": deleted}
    if as_json:
        sys.stdout.write(json.dumps(facts) + "\n")
    else:
        sys.stdout.write(f"{cache.folder}: {count} entries, {num_bytes / 1e6:.1f} MB" + (f", {deleted} deleted" if clear else "") + "\n")
