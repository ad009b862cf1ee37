-- cost: hits and depth stand for time, because what is deep took longer to compute. Doubling either is worth the same.
policies.cost = function(accessed, hits, depth, size)
  return accessed + 60000 * math.log((1 + hits) * (1 + (depth + size) / 256)) / math.log(2)
end
