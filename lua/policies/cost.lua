-- cost: what is large and nobody has found yet goes up to four seconds early: it takes the most room for the least
-- chance to be asked for. Hits take that back, and so does depth, because deep chunks cost more prefill.
policies.cost = function(accessed, hits, depth, size)
  return accessed - 500 * math.log(1 + size) / math.log(2) / ((1 + hits) * (1 + depth / 2048))
end
