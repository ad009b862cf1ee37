-- Visits the nodes below `top` ("root" for all of the tree) and then `top`, children before their parents, until the
-- budget is spent. What is visited must be marked by it, so that `wants` and `wanted` no longer count it: a call that
-- resumes finds its place by the tree itself, and no state grows with depth.
-- `visit.wanted(last)`: how many children of the node with this last chunk are to be visited, 0 to pass over them all;
-- `visit.wants(child, last)`: whether this one is, which names `last` as what precedes it: so each node has one parent,
-- and no way down comes back to `top`; `visit.leave(head, run)`: nothing below the node is left to do.
-- `resume`: what the last call returned, "" to begin. Returns the same for the next call, "" when all is done: the
-- head of the node reached and, for nodes above it with many children, how far these were looked at.
local function descend(top, resume, visit)
  local scans = {} -- by head: `at`: where HSCAN begins the portion; `next`: what follows; `left`: not yet looked at

  local function read_portion(scan, last)
    local reply = redis.pcall('HSCAN', junction_key(last), scan.at, 'COUNT', 32)
    reply = reply.err and { '0', {} } or reply
    scan.next, scan.left, scan.size = reply[1], {}, #reply[2] / 2
    scan.is_whole = scan.at == '0' and scan.next == '0' -- small hashes come at once: `name` marks the place in them
    for i = 1, #reply[2], 2 do
      local field = reply[2][i]
      if is_child(field) and not (scan.is_whole and scan.name and field <= scan.name) then
        scan.left[#scan.left + 1] = field
      end
    end
    table.sort(scan.left, function(a, b) return a > b end)
    spend(1 + scan.size / 25)
  end

  -- A child to visit; nil when none is left, false when the budget was spent before one was found.
  local function next_child(head, last)
    local scan = scans[head] or { at = '0', found = false }
    scans[head] = scan
    if last and last ~= '' and not scan.is_owned and visit.wanted(last) > 0 then
      scan.is_owned = redis.pcall('HGET', junction_key(last), 'o') == head
      if not scan.is_owned then
        last = nil -- whose children these are is not known
        damaged = damaged + 1
      end
    end
    while last and visit.wanted(last) > 0 do
      if not scan.left then
        read_portion(scan, last)
      end
      while #scan.left > 0 do
        scan.name = table.remove(scan.left)
        spend(0.5)
        if scan.name ~= top and visit.wants(scan.name, last) then
          scan.found = true
          return scan.name
        elseif scan.is_whole and scan.size > 32 and is_spent() then
          return false
        end
      end
      scan.at, scan.left, scan.name = scan.next, nil, nil
      if scan.at == '0' and not scan.found then
        break -- a whole pass has found none: the junction counts what is not there
      end
      scan.found = scan.found and scan.at ~= '0'
      if is_spent() then
        return false
      end
    end
    scans[head] = nil
    return nil
  end

  local head = resume:match('^%w+') or top
  if head ~= top and top ~= 'root' and depth_of(head) <= depth_of(top) then
    head = top -- the node is no longer there, or `top` is the lower half of a split
  else
    for name, at, found, child in resume:gmatch(' (%w+):(%d+):(%d):(%w*)') do
      scans[name] = { at = at, found = found == '1', name = child ~= '' and child or nil }
    end
  end
  return climb(head, top, visit, next_child, scans)
end
