"""Two nodes share a prefix: what one has computed, the other finds. Needs `pip install 'distprefix[embedded]'`.

Give a url (redis://host:6379) to run it against your own server.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer

SYSTEM_PROMPT = list(range(1000, 1512))
QUESTION, OTHER_QUESTION = list(range(64)), list(range(500, 580))


def main(url: str = "embedded://two-nodes-example") -> None:
    """Publish on one node, look up on another."""
    config_a = PrefixCacheConfig(url=url, namespace="two-nodes-example", worker_id="node-a")
    config_b = replace(config_a, worker_id="node-b")
    with PrefixCacheOptimizer(config_a) as node_a, PrefixCacheOptimizer(config_b) as node_b:
        prompt = SYSTEM_PROMPT + QUESTION
        node_a.cache_prefix(prompt, block_ids=range(len(prompt) // 16))
        prompt = SYSTEM_PROMPT + OTHER_QUESTION
        hit = node_b.find_longest_cache_hit(
            prompt, max_cache_hit_length=len(prompt) - 1
        )  # engines compute one at least
        print(f"node-b need not compute {hit.matched_tokens} of {len(prompt)} tokens")
        for holder in hit.holders:
            print(f"{holder.worker} has {holder.chunks} chunks on its {holder.medium}")
        print(f"left to compute: {len(hit.remaining_tokens)} tokens, after {hit.redis_calls} Redis call")
        again = node_b.find_longest_cache_hit(SYSTEM_PROMPT)
        print(f"asked again: {again.matched_tokens} tokens from its own L1, {again.redis_calls} Redis calls")
        node_a.clear()


if __name__ == "__main__":
    main(*sys.argv[1:])
