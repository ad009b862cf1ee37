"""What an installed wheel must be able to do, without the checkout. Run by the gate in a clean environment."""

from __future__ import annotations

from pathlib import Path

import distprefix
from distprefix import PrefixCacheConfig, PrefixCacheOptimizer

if __name__ == "__main__":
    package = Path(distprefix.__file__).parent
    assert (package / "lua" / "walk.lua").is_file(), "the scripts are not in the wheel"
    assert (package / "py.typed").is_file(), "py.typed is not in the wheel"
    with PrefixCacheOptimizer() as first:
        first.cache_prefix(range_tokens := list(range(64)), list(range(4)))
        with PrefixCacheOptimizer(PrefixCacheConfig(url=first.url, worker_id="second")) as second:
            hit = second.find_longest_cache_hit([*range_tokens[:48], 7, 7])
            assert hit.matched_tokens == 48, hit
            assert second.find_longest_cache_hit(range_tokens).holders[0].name == first.config.holder
        assert first.check_integrity().ok
    print(f"distprefix {distprefix.__version__} works from {package.name}")
