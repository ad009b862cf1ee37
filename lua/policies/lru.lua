-- lru: the leaf used longest ago goes first.
policies.lru = function(accessed)
  return accessed
end
