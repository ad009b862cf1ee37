-- Visits the nodes below `top` ("root" for all of the tree) and then `top`, children before their parents, until the
-- budget is spent. What is visited must be marked by it, so that `wants` and `wanted` no longer count it: a call that
-- resumes finds its place by the tree itself, and no state grows with depth.
-- `visit.wanted(last)`: how many children of the node with this last chunk are to be visited, 0 to pass over them all;
-- `visit.wants(child, last)`: whether this one is; `visit.leave(head, run)`: nothing below the node is left to do.
-- `resume`: what the last call returned, "" to begin. Returns the same for the next call, "" when all is done. It has
-- the head of the node reached and, for each node above it with many children, how far HSCAN has read them.
local function descend(top, resume, visit)
  local scans, portion = {}, 64 -- a scan: where the portion begins, what follows it, and the children left in it

  local function next_child(head, run)
    local last = head == 'root' and '' or (run and #run >= 16 and hex(run))
    local scan = scans[head] or { at = '0', left = {}, found = false }
    scans[head] = scan
    while #scan.left == 0 do
      local is_over = scan.after == '0'
      scan.at, scan.after = scan.after or scan.at, nil
      if not last or visit.wanted(last) <= 0 or (is_over and not scan.found) then
        scans[head] = nil
        return nil -- none is left, or the junction counts what is not there: a whole pass has found none
      end
      scan.found = scan.found and not is_over
      local reply = redis.call('HSCAN', junction_key(last), scan.at, 'COUNT', portion)
      scan.after = reply[1]
      for i = 1, #reply[2], 2 do
        if is_child(reply[2][i]) and visit.wants(reply[2][i], last) then
          scan.left[#scan.left + 1] = reply[2][i]
        end
      end
      scan.found = scan.found or #scan.left > 0
      spend(1 + #reply[2] / 25)
      if #scan.left == 0 and is_spent() then
        return false -- to be gone on with
      end
    end
    return table.remove(scan.left)
  end

  local head = resume:match('^%S+') or top
  local at = head ~= top and tonumber(redis.call('HGET', node_key(head), 'd') or '') or -1
  local above = top ~= 'root' and tonumber(redis.call('HGET', node_key(top), 'd') or '') or -1
  if head ~= top and at <= above then
    head = top -- the node is no longer there, or was split at its lower half
  else
    for name, from, found in resume:gmatch(' (%w+):(%d+):(%d)') do
      scans[name] = { at = from, left = {}, found = found == '1' }
    end
  end
  repeat
    spend(0.5)
    local run, parent = '', ''
    if head ~= 'root' then
      run, parent = unpack(redis.call('HMGET', node_key(head), 'r', 'p'))
    end
    local child = next_child(head, run)
    if child == nil then
      local owner = head ~= top and (parent == '' and 'root' or redis.call('HGET', junction_key(parent or ''), 'o'))
      visit.leave(head, run)
      if head == top then
        return ''
      end
      child = owner or top
    end
    head = child or head
  until is_spent()
  local cursor = { head }
  for name, scan in pairs(scans) do
    if scan.at ~= '0' and #cursor <= 100 then
      cursor[#cursor + 1] = ('%s:%s:%d'):format(name, scan.at, scan.found and 1 or 0)
    end
  end
  return table.concat(cursor, ' ')
end
