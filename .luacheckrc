std = "lua51"
read_globals = { "redis", "KEYS", "ARGV" }
max_line_length = 120
-- Parts are put into several scripts, and not every script calls all that a part defines.
ignore = {
  "211/affordable", "211/allow", "211/is_spent", "211/packed_size", "211/spend", "211/stored_before",
  "211/covers_parent", "211/discard", "211/hex", "211/changed", "211/hold", "211/junction_key", "211/node_key", "211/rank", "211/score",
  "211/keep_all", "211/payload_key", "211/release", "211/release_all", "211/size_at", "211/shorten", "211/slice", "211/sum_of", "211/tiers", "211/void", "211/weigh", "211/walk",
  "211/allow", "211/is_child", "211/is_spent", "211/tally", "211/tally_all", "211/covered_children", "211/spend",
  "211/count_of", "211/is_run",
  "212/hits", "212/depth", "212/size",
}
