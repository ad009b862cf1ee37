-- Whether a node can be, and ends at depth `below`, where the node begins that it precedes (nil: any). What is damaged
-- is counted. Depths fall on every way up that is gone so: none is a circle.
local function is_sound(head, run, depth, parent, below)
  local starts = count_of(depth, -1)
  local is_right = is_run(head, run) and starts >= 0 and (parent ~= '' or starts == 0)
    and (not below or starts + #run / 16 == below)
  damaged = damaged + (is_right and 0 or 1)
  return is_right
end
